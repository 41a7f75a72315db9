SELECT seq, turn, output FROM watermark WHERE session_id = :session_id
