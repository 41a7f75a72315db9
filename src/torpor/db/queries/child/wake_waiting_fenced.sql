-- By the child's owner, with its end: who sleeps and waits for it looks what became of it, its parent and the forks of
-- that, which know the waitpoint by the same id. One that only a person wakes sleeps on.
UPDATE session SET wake_ns = 0
WHERE wake_ns IS NOT NULL
    AND session_id IN (
        WITH RECURSIVE kin (session_id, waitpoint_id) AS (
            SELECT parent_id, waitpoint_id FROM child WHERE child.session_id = :session_id
            UNION
            SELECT fork.session_id, kin.waitpoint_id FROM session fork JOIN kin ON fork.parent_id = kin.session_id
        )
        SELECT waitpoint.session_id FROM waitpoint JOIN kin
            ON waitpoint.session_id = kin.session_id AND waitpoint.waitpoint_id = kin.waitpoint_id
        WHERE waitpoint.resolved_ns IS NULL
    )
    AND EXISTS (SELECT 1 FROM session ended
        WHERE ended.session_id = :session_id AND ended.owner_token = :owner_token)
