SELECT * FROM message WHERE session_id = :session_id AND box = :box AND call_id = :call_id ORDER BY number LIMIT 1
