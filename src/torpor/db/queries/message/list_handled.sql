SELECT number, call_id FROM message WHERE session_id = :session_id AND box = 'in' AND call_id IS NOT NULL ORDER BY number
