SELECT call_id, session_id, number, head, head_digest, manifest, body_digest, body_bytes
FROM request
WHERE session_id = :session_id
ORDER BY number
