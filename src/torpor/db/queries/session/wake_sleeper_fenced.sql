-- One that only a person wakes sleeps on.
UPDATE session SET wake_ns = 0
WHERE session_id = :session_id AND owner_token = :owner_token AND wake_ns IS NOT NULL
