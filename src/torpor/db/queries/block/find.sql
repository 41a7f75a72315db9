SELECT codec, size_bytes, data FROM block WHERE session_id = :session_id AND digest = :digest
