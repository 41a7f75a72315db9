UPDATE tenant SET master_id = :master_id, wrapped = :wrapped
WHERE tenant_id = :tenant_id AND master_id = :seen_master_id
