-- The waitpoint names its child, in the parent's row as in that of a fork of the parent.
SELECT child.on_cancel, session.* FROM child JOIN session ON session.session_id = child.session_id
WHERE child.session_id = :child_id
