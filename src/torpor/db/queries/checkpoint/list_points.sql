SELECT checkpoint_id, number, snapshot_id, wall_ns, damage, pinned, left_seq,
    (SELECT COUNT(*) FROM checkpoint AS other
        WHERE other.snapshot_id = checkpoint.snapshot_id AND other.session_id <> checkpoint.session_id)
    + (SELECT COUNT(*) FROM session AS fork
        WHERE fork.parent_id = checkpoint.session_id AND fork.forked_at_seq = checkpoint.seq) AS others
FROM checkpoint
WHERE session_id = :session_id
ORDER BY number
