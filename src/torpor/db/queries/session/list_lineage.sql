-- UNION drops what was found before, so parents in a circle, which only a forged import has, end it too.
WITH RECURSIVE
ancestor (session_id, parent_id) AS (
    SELECT session_id, parent_id FROM session WHERE session_id = :session_id
    UNION
    SELECT session.session_id, session.parent_id
    FROM session JOIN ancestor ON session.session_id = ancestor.parent_id
),
relative (session_id) AS (
    SELECT session_id FROM ancestor
    UNION
    SELECT session.session_id FROM session JOIN relative ON session.parent_id = relative.session_id
)
SELECT session.* FROM session JOIN relative ON session.session_id = relative.session_id
ORDER BY session.created_ns, session.session_id
