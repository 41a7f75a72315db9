UPDATE attempt SET head = :head
WHERE call_id = :call_id AND number = :number AND head IS NULL AND chunk_count IS NULL
    AND EXISTS (SELECT 1 FROM call WHERE call_id = :call_id AND session_id = :session_id)
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
