UPDATE session SET incarnation = :incarnation
WHERE session_id = :session_id AND owner_token = :owner_token AND incarnation < :incarnation
