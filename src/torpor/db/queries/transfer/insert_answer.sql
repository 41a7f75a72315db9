INSERT INTO answer (call_id, attempt, codec, layout, data)
VALUES (:call_id, :attempt, :codec, :layout, :data)
