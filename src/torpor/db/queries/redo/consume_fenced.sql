-- At most once in an incarnation, and only in the present one.
UPDATE redo SET consumed_seq = (SELECT head_seq FROM session WHERE session_id = :session_id)
WHERE session_id = :session_id AND incarnation = :incarnation AND call_id = :call_id AND consumed_seq IS NULL
    AND EXISTS (SELECT 1 FROM session
        WHERE session_id = :session_id AND owner_token = :owner_token AND incarnation = :incarnation)
