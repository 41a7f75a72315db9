UPDATE attempt SET chunk_count = :chunk_count, body_bytes = :body_bytes, finished = :finished,
    cost_nanousd = :cost_nanousd
WHERE call_id = :call_id AND number = :number AND chunk_count IS NULL
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
