SELECT * FROM call WHERE call_id = :call_id
