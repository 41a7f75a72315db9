SELECT number FROM checkpoint WHERE session_id = :session_id LIMIT 1
