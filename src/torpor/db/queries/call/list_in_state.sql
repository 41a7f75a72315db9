SELECT * FROM call
WHERE session_id = :session_id AND state = :state
ORDER BY intended_seq
