SELECT call_id, number, sent_ns, head, finished, reserved_nanousd, cost_nanousd,
    COALESCE(chunk_count, (SELECT COUNT(*) FROM chunk c
        WHERE c.call_id = attempt.call_id AND c.attempt = attempt.number)) AS chunk_count,
    COALESCE(body_bytes, (SELECT COALESCE(SUM(LENGTH(c.data)), 0) FROM chunk c
        WHERE c.call_id = attempt.call_id AND c.attempt = attempt.number)) AS body_bytes
FROM attempt
WHERE call_id = :call_id
ORDER BY number
