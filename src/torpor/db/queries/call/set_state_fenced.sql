UPDATE call SET state = :state, ended_seq = :ended_seq, usage = COALESCE(:usage, usage)
WHERE call_id = :call_id AND session_id = :session_id AND state = :seen_state
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
