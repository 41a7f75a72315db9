INSERT INTO block (session_id, digest, codec, size_bytes, data, blob)
SELECT session_id, :digest, :codec, :size_bytes, :data, :blob
FROM session
WHERE session_id = :session_id AND owner_token = :owner_token
ON CONFLICT (session_id, digest) DO NOTHING
