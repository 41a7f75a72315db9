SELECT * FROM message WHERE session_id = :session_id ORDER BY box, number
