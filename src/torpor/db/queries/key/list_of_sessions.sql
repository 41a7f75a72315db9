SELECT * FROM session_key ORDER BY session_id
