SELECT incarnation, position, data, wall_ns FROM output
WHERE session_id = :session_id AND channel = :channel
ORDER BY incarnation, position
