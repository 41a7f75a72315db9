SELECT incarnation, position, LENGTH(data) AS size_bytes FROM output
WHERE session_id = :session_id AND channel = :channel
ORDER BY incarnation DESC, position DESC
LIMIT 1
