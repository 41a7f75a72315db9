SELECT * FROM waitpoint WHERE session_id = :session_id ORDER BY created_ns, waitpoint_id
