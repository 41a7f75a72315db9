INSERT INTO waitpoint (waitpoint_id, session_id, kind, call_id, data, created_ns, due_ns)
SELECT :waitpoint_id, session_id, :kind, :call_id, :data, :created_ns, :due_ns
FROM session
WHERE session_id = :session_id AND owner_token = :owner_token
