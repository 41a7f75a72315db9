SELECT session_id, channel, incarnation, position, data, wall_ns
FROM output
WHERE session_id = :session_id
ORDER BY channel, incarnation, position
