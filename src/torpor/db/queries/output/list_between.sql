SELECT position, data, wall_ns FROM output
WHERE session_id = :session_id AND channel = :channel AND incarnation = :incarnation
    AND position >= (SELECT COALESCE(MAX(position), 0) FROM output
        WHERE session_id = :session_id AND channel = :channel AND incarnation = :incarnation
            AND position <= :from_position)
    AND position < :to_position
ORDER BY position
LIMIT :row_limit
