SELECT COALESCE(MAX(number), 0) AS number FROM message WHERE session_id = :session_id AND box = :box
