SELECT * FROM checkpoint WHERE checkpoint_id = :checkpoint_id
