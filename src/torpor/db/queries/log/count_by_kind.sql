SELECT kind, COUNT(*) AS events FROM event
WHERE session_id = :session_id
GROUP BY kind
