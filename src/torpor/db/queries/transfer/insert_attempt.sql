INSERT INTO attempt (call_id, number, sent_ns, head, chunk_count, body_bytes, finished)
VALUES (:call_id, :number, :sent_ns, :head, :chunk_count, :body_bytes, :finished)
