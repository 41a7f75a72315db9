SELECT * FROM checkpoint
WHERE session_id = :session_id AND damage IS NULL AND left_seq IS NULL
ORDER BY number DESC
LIMIT 1
