SELECT * FROM event
WHERE session_id = :session_id AND kind = :kind
ORDER BY seq
