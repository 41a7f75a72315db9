INSERT INTO message (session_id, box, number, seq, wall_ns, digest, size_bytes, call_id)
VALUES (:session_id, :box, :number, :seq, :wall_ns, :digest, :size_bytes, :call_id)
