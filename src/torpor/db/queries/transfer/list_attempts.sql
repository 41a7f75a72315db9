SELECT call_id, number, sent_ns, head, chunk_count, body_bytes, finished, reserved_nanousd, cost_nanousd
FROM attempt
WHERE call_id IN (SELECT call_id FROM call WHERE session_id = :session_id)
ORDER BY call_id, number
