-- By the child's owner, with its end: a parent that sleeps looks what became of it. One that only a person wakes sleeps on.
UPDATE session SET wake_ns = 0
WHERE wake_ns IS NOT NULL
    AND session_id = (SELECT parent_id FROM child WHERE child.session_id = :session_id)
    AND EXISTS (SELECT 1 FROM session ended
        WHERE ended.session_id = :session_id AND ended.owner_token = :owner_token)
