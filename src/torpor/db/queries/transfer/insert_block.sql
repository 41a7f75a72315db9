INSERT INTO block (session_id, digest, codec, size_bytes, data, blob)
VALUES (:session_id, :digest, :codec, :size_bytes, :data, :blob)
