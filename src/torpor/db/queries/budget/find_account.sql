-- A session shares the budget of the oldest of its parents that is there, with all that came from that one by spawning.
-- An attempt that ended without a cost counts with what was reserved for it.
WITH RECURSIVE
above (session_id, height) AS (
    SELECT session_id, 0 FROM session WHERE session_id = :session_id
    UNION
    SELECT session.session_id, above.height + 1
    FROM above
    JOIN child ON child.session_id = above.session_id
    JOIN session ON session.session_id = child.parent_id
),
oldest (session_id) AS (
    SELECT session_id FROM above ORDER BY height DESC LIMIT 1
),
family (session_id) AS (
    SELECT session_id FROM oldest
    UNION
    SELECT child.session_id FROM family JOIN child ON child.parent_id = family.session_id
)
SELECT session.budget_nanousd,
    (SELECT COALESCE(SUM(COALESCE(attempt.cost_nanousd,
            CASE WHEN attempt.chunk_count IS NULL THEN 0 ELSE attempt.reserved_nanousd END)), 0)
        FROM call JOIN attempt ON attempt.call_id = call.call_id
        WHERE call.session_id IN (SELECT session_id FROM family)) AS spent_nanousd,
    (SELECT COALESCE(SUM(CASE WHEN attempt.cost_nanousd IS NULL AND attempt.chunk_count IS NULL
            THEN attempt.reserved_nanousd END), 0)
        FROM call JOIN attempt ON attempt.call_id = call.call_id
        WHERE call.session_id IN (SELECT session_id FROM family)) AS reserved_nanousd
FROM session JOIN oldest ON session.session_id = oldest.session_id
