SELECT incarnation, MIN(position) AS first_position FROM output
WHERE session_id = :session_id AND channel = :channel
GROUP BY incarnation
ORDER BY incarnation
