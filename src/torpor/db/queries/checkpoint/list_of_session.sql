SELECT * FROM checkpoint WHERE session_id = :session_id ORDER BY number
