-- Of two that index the same events, one does.
UPDATE watermark SET seq = :seq, turn = :turn, output = :output
WHERE session_id = :session_id AND seq = :seen_seq AND output = :seen_output
