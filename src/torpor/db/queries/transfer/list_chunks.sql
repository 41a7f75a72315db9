SELECT call_id, attempt, number, offset_ns, data
FROM chunk
WHERE call_id IN (SELECT call_id FROM call WHERE session_id = :session_id)
ORDER BY call_id, attempt, number
