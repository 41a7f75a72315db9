SELECT * FROM session ORDER BY session_id DESC LIMIT :row_limit
