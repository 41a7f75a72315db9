INSERT INTO session_key (session_id, key_id, master_id, wrapped)
SELECT session_id, :key_id, master_id, :wrapped
FROM session, tenant
WHERE session_id = :session_id AND owner_token = :owner_token AND tenant_id = :tenant_id AND master_id = :master_id
