SELECT * FROM session_key WHERE session_id = :session_id
