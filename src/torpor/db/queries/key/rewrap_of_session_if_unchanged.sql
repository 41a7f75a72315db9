UPDATE session_key SET master_id = :master_id, wrapped = :wrapped
WHERE session_id = :session_id AND master_id = :seen_master_id
