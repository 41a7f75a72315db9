INSERT INTO call (call_id, session_id, state, key_exact, key_canonical, key_logical, about, incarnation, stream,
    request_bytes, intended_seq, ended_seq, usage)
VALUES (:call_id, :session_id, :state, :key_exact, :key_canonical, :key_logical, :about, :incarnation, :stream,
    :request_bytes, :intended_seq, :ended_seq, :usage)
