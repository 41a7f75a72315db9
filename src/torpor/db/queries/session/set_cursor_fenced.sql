UPDATE session SET cursor_seq = :cursor_seq
WHERE session_id = :session_id AND owner_token = :owner_token AND :cursor_seq BETWEEN 1 AND head_seq
