INSERT INTO block (session_id, digest, codec, size_bytes, data)
VALUES (:session_id, :digest, :codec, :size_bytes, :data)
