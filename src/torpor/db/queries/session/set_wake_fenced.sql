UPDATE session SET wake_ns = :wake_ns
WHERE session_id = :session_id AND owner_token = :owner_token
