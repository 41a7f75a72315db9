UPDATE message SET call_id = NULL
WHERE session_id = :session_id AND box = 'in' AND call_id = :call_id
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
