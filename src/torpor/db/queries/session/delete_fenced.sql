DELETE FROM session WHERE session_id = :session_id AND owner_token = :owner_token
