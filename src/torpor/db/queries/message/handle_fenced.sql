-- One call handles a message, and only once.
UPDATE message SET call_id = :call_id
WHERE session_id = :session_id AND box = 'in' AND number = :number AND call_id IS NULL
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
