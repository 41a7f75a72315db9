SELECT * FROM message WHERE session_id = :session_id AND box = 'in' AND call_id IS NULL ORDER BY number LIMIT 1
