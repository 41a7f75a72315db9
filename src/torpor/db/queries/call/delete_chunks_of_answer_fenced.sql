-- Only what stands in the answer's row may go.
DELETE FROM chunk WHERE call_id = :call_id AND attempt = :attempt
    AND EXISTS (SELECT 1 FROM answer WHERE call_id = :call_id AND attempt = :attempt)
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
