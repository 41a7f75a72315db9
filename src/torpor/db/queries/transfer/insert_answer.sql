INSERT INTO answer (call_id, attempt, codec, layout, data, blob)
VALUES (:call_id, :attempt, :codec, :layout, :data, :blob)
