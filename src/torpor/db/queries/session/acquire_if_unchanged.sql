-- The one statement that raises the token: of two nodes that saw the same token, one gets the session.
UPDATE session
SET owner_token = owner_token + 1, node_id = :node_id, boot_id = :boot_id, pid = :pid, updated_ns = :wall_ns
WHERE session_id = :session_id AND owner_token = :seen_token
RETURNING owner_token
