-- Some of the rows whose bytes stand in the answer's row, or in the blob that it names.
DELETE FROM chunk WHERE call_id = :call_id AND attempt = :attempt AND number <= :last
    AND EXISTS (SELECT 1 FROM answer WHERE call_id = :call_id AND attempt = :attempt)
    AND EXISTS (SELECT 1 FROM call WHERE call_id = :call_id AND session_id = :session_id)
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
