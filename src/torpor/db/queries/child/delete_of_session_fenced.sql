DELETE FROM child WHERE session_id = :session_id
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
