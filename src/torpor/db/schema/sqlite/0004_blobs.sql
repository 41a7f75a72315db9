-- Large bodies outside of the database: the row names an object of the blob store, and its `data` is empty.

ALTER TABLE block ADD COLUMN blob BLOB;   -- SHA-256 of the bytes as stored; null: they are in `data`
ALTER TABLE answer ADD COLUMN blob BLOB;

CREATE INDEX blob_of_block ON block (session_id, blob) WHERE blob IS NOT NULL;
CREATE INDEX blob_of_answer ON answer (call_id, blob) WHERE blob IS NOT NULL;
