UPDATE answer SET codec = :codec, data = :data, blob = :blob
WHERE call_id = :call_id AND attempt = :attempt
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
