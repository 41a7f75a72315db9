SELECT checkpoint_id, number, snapshot_id, wall_ns, damage, pinned, left_seq,
    (SELECT COUNT(*) FROM checkpoint AS other
        WHERE other.snapshot_id = checkpoint.snapshot_id AND other.session_id <> checkpoint.session_id) AS others
FROM checkpoint
WHERE session_id = :session_id
ORDER BY number
