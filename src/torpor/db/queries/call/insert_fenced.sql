INSERT INTO call (call_id, session_id, state, key_exact, key_canonical, key_logical, about, incarnation, stream,
    request_bytes, intended_seq, usage)
SELECT :call_id, session_id, :state, :key_exact, :key_canonical, :key_logical, :about, :incarnation, :stream,
    :request_bytes, :intended_seq, '{}'
FROM session
WHERE session_id = :session_id AND owner_token = :owner_token
