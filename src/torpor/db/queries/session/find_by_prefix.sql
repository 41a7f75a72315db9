SELECT * FROM session
WHERE substr(session_id, 1, :prefix_length) = :prefix
ORDER BY session_id
LIMIT 2
