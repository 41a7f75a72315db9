SELECT incarnation, position, data FROM output
WHERE session_id = :session_id AND channel = :channel
    AND (incarnation > :incarnation OR (incarnation = :incarnation AND position > :position))
ORDER BY incarnation, position
LIMIT :row_limit
