INSERT INTO tenant (tenant_id, key_id, master_id, wrapped)
VALUES (:tenant_id, :key_id, :master_id, :wrapped)
ON CONFLICT (tenant_id) DO NOTHING
