-- The digest stays that of the true content; what is left of it is masked.
UPDATE block SET codec = :codec, data = :data, blob = :blob
WHERE session_id = :session_id AND digest = :digest
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
