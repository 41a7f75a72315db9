INSERT INTO request (call_id, session_id, number, head, head_digest, manifest, body_digest, body_bytes)
SELECT :call_id, session_id, 1 + (SELECT COALESCE(MAX(number), 0) FROM request WHERE session_id = :session_id), '',
    :head_digest, :manifest, :body_digest, :body_bytes
FROM session
WHERE session_id = :session_id AND owner_token = :owner_token
