SELECT * FROM request WHERE call_id = :call_id
