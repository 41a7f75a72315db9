-- A chunk joins the end of the answer that its call is receiving now, or it is no chunk.
INSERT INTO chunk (call_id, attempt, number, offset_ns, data)
SELECT :call_id, :attempt, :number, :offset_ns, :data
FROM session
WHERE session_id = :session_id AND owner_token = :owner_token
    AND EXISTS (SELECT 1 FROM call WHERE call_id = :call_id AND session_id = :session_id AND state = :open_state)
    AND EXISTS (SELECT 1 FROM attempt
        WHERE call_id = :call_id AND number = :attempt AND head IS NOT NULL AND chunk_count IS NULL)
    AND :number = (SELECT COALESCE(MAX(number), -1) + 1 FROM chunk WHERE call_id = :call_id AND attempt = :attempt)
