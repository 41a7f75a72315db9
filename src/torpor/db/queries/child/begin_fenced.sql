-- A node is to run it from now on. By the parent's owner, and only while nobody has run it.
UPDATE session SET wake_ns = 0
WHERE session_id = :child_id AND status = 'created'
    AND EXISTS (SELECT 1 FROM child WHERE child.session_id = :child_id AND child.parent_id = :session_id)
    AND EXISTS (SELECT 1 FROM session parent
        WHERE parent.session_id = :session_id AND parent.owner_token = :owner_token)
