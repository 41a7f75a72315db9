SELECT session_id, digest, codec, size_bytes, data, blob
FROM block
WHERE session_id = :session_id
ORDER BY digest
