SELECT * FROM waitpoint WHERE session_id = :session_id AND call_id = :call_id ORDER BY created_ns, waitpoint_id
