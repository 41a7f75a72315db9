INSERT INTO event (session_id, seq, parent_seq, incarnation, wall_ns, kind, call_id, data, refs, prev_hash, hash)
SELECT session_id, :seq, :parent_seq, :incarnation, :wall_ns, :kind, :call_id, :data, :refs, :prev_hash, :hash
FROM session
WHERE session_id = :session_id AND owner_token = :owner_token AND head_seq = :seen_seq
