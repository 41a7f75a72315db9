INSERT INTO chunk (call_id, attempt, number, offset_ns, data)
VALUES (:call_id, :attempt, :number, :offset_ns, :data)
