SELECT * FROM call WHERE session_id = :session_id AND intended_seq > :seq ORDER BY intended_seq
