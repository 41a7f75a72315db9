DELETE FROM answer WHERE call_id IN (SELECT call_id FROM call WHERE session_id = :session_id)
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
