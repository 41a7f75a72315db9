INSERT INTO attempt (call_id, number, sent_ns, head, chunk_count, body_bytes, finished, reserved_nanousd, cost_nanousd)
VALUES (:call_id, :number, :sent_ns, :head, :chunk_count, :body_bytes, :finished, :reserved_nanousd, :cost_nanousd)
