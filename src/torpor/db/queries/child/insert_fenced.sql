-- By the parent's owner.
INSERT INTO child (session_id, parent_id, waitpoint_id, on_cancel)
SELECT :child_id, session_id, :waitpoint_id, :on_cancel
FROM session
WHERE session_id = :session_id AND owner_token = :owner_token
