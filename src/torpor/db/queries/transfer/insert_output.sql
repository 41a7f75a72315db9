INSERT INTO output (session_id, channel, incarnation, position, data, wall_ns)
VALUES (:session_id, :channel, :incarnation, :position, :data, :wall_ns)
