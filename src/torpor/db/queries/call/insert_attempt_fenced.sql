INSERT INTO attempt (call_id, number, sent_ns, finished, reserved_nanousd)
SELECT :call_id, :number, :sent_ns, 0, :reserved_nanousd
FROM session
WHERE session_id = :session_id AND owner_token = :owner_token
    AND :number = 1 + (SELECT COUNT(*) FROM attempt WHERE call_id = :call_id)
