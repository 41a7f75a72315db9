UPDATE output SET data = :data
WHERE session_id = :session_id AND channel = :channel AND incarnation = :incarnation AND position = :position
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
