SELECT session_id, seq, parent_seq, incarnation, wall_ns, kind, call_id, data, refs, prev_hash, hash
FROM event
WHERE session_id = :session_id
ORDER BY seq
