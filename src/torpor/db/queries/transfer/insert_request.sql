INSERT INTO request (call_id, session_id, number, head, head_digest, manifest, body_digest, body_bytes)
VALUES (:call_id, :session_id, :number, :head, :head_digest, :manifest, :body_digest, :body_bytes)
