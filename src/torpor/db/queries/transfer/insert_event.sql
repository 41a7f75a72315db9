INSERT INTO event (session_id, seq, parent_seq, incarnation, wall_ns, kind, call_id, data, refs, prev_hash, hash)
VALUES (:session_id, :seq, :parent_seq, :incarnation, :wall_ns, :kind, :call_id, :data, :refs, :prev_hash, :hash)
