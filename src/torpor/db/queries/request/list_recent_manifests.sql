SELECT manifest FROM request
WHERE session_id = :session_id
ORDER BY number DESC
LIMIT :row_limit
