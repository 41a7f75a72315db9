INSERT INTO found (content, session_id, seq, turn, source) VALUES (:content, :session_id, :seq, :turn, :source)
