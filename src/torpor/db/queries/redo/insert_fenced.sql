INSERT INTO redo (session_id, incarnation, position, call_id, role)
SELECT session_id, :incarnation, :position, :call_id, :role
FROM session
WHERE session_id = :session_id AND owner_token = :owner_token
    AND EXISTS (SELECT 1 FROM call WHERE call_id = :call_id AND session_id = :session_id)
