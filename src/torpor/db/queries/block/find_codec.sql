SELECT codec FROM block WHERE session_id = :session_id AND digest = :digest
