SELECT * FROM waitpoint WHERE session_id = :session_id AND resolved_ns IS NULL ORDER BY created_ns, waitpoint_id
