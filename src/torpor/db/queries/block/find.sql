SELECT codec, size_bytes, data, blob FROM block WHERE session_id = :session_id AND digest = :digest
