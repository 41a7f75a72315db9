INSERT INTO answer (call_id, attempt, codec, layout, data, blob)
SELECT :call_id, :attempt, :codec, :layout, :data, :blob
FROM session
WHERE session_id = :session_id AND owner_token = :owner_token
    AND EXISTS (SELECT 1 FROM attempt WHERE call_id = :call_id AND number = :attempt AND chunk_count IS NOT NULL)
