SELECT * FROM event
WHERE session_id = :session_id AND seq > :after_seq
ORDER BY seq
LIMIT :row_limit
