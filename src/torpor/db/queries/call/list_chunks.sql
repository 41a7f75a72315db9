SELECT number, offset_ns, data FROM chunk
WHERE call_id = :call_id AND attempt = :attempt
ORDER BY number
