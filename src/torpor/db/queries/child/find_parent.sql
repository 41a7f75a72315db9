SELECT parent_id FROM child WHERE session_id = :session_id
