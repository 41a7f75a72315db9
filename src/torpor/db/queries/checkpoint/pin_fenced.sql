UPDATE checkpoint SET pinned = :pinned
WHERE session_id = :session_id AND number = :number
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
