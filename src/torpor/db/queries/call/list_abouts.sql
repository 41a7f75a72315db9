SELECT call_id, about FROM call WHERE session_id = :session_id ORDER BY intended_seq
