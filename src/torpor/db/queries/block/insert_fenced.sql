INSERT INTO block (session_id, digest, codec, size_bytes, data)
SELECT session_id, :digest, :codec, :size_bytes, :data
FROM session
WHERE session_id = :session_id AND owner_token = :owner_token
ON CONFLICT (session_id, digest) DO NOTHING
