SELECT session_id, seq, turn, source, snippet(found, 0, :mark_start, :mark_end, ' ... ', 24) AS excerpt
FROM found
WHERE found MATCH :words AND (:session_id IS NULL OR session_id = :session_id)
ORDER BY rank
LIMIT :row_limit
