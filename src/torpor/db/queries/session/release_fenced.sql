UPDATE session SET node_id = NULL, boot_id = NULL, pid = NULL, updated_ns = :wall_ns
WHERE session_id = :session_id AND owner_token = :owner_token
