UPDATE session SET head_seq = :seq, head_hash = :hash
WHERE session_id = :session_id AND owner_token = :owner_token AND head_seq = :seen_seq AND head_hash = :seen_hash
