SELECT call_id, attempt, codec, layout, data, blob
FROM answer
WHERE call_id IN (SELECT call_id FROM call WHERE session_id = :session_id)
ORDER BY call_id, attempt
