INSERT INTO watermark (session_id, seq, turn, output) VALUES (:session_id, 0, 0, '{}')
ON CONFLICT (session_id) DO NOTHING
