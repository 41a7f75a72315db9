UPDATE checkpoint SET left_seq = :left_seq
WHERE session_id = :session_id AND left_seq IS NULL AND (seq > :seq OR (seq = :seq AND number > :number))
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
