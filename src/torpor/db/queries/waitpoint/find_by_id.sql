SELECT * FROM waitpoint WHERE session_id = :session_id AND waitpoint_id = :waitpoint_id
