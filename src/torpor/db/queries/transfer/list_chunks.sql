SELECT call_id, attempt, number, offset_ns, data
FROM chunk
WHERE call_id IN (SELECT call_id FROM call WHERE session_id = :session_id)
    AND NOT EXISTS (SELECT 1 FROM answer WHERE answer.call_id = chunk.call_id AND answer.attempt = chunk.attempt)
ORDER BY call_id, attempt, number
