SELECT * FROM tenant WHERE tenant_id = :tenant_id
