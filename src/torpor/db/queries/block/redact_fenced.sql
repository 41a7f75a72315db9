UPDATE block SET codec = 'redacted', data = :nothing
WHERE session_id = :session_id AND digest = :digest
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
