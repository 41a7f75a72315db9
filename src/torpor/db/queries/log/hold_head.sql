-- The fence of an append: it also locks the session's row, where a database has such locks, until the commit.
UPDATE session SET updated_ns = :wall_ns
WHERE session_id = :session_id AND owner_token = :owner_token
RETURNING head_seq, head_hash, cursor_seq, incarnation, budget_nanousd
