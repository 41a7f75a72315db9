SELECT child.on_cancel, session.* FROM child JOIN session ON session.session_id = child.session_id
WHERE child.parent_id = :session_id AND child.waitpoint_id = :waitpoint_id
