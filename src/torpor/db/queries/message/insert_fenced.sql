INSERT INTO message (session_id, box, number, seq, wall_ns, digest, size_bytes, call_id)
SELECT session_id, :box, :number, :seq, :wall_ns, :digest, :size_bytes, :call_id
FROM session
WHERE session_id = :session_id AND owner_token = :owner_token
