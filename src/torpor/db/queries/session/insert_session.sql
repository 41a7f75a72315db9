INSERT INTO session (session_id, name, status, spec, owner_token, incarnation, head_seq, head_hash, cursor_seq,
    created_ns, updated_ns, budget_nanousd, parent_id, forked_at_seq)
VALUES (:session_id, :name, :status, :spec, 0, 0, 0, :head_hash, 0, :wall_ns, :wall_ns, :budget_nanousd, :parent_id,
    :forked_at_seq)
ON CONFLICT (name) DO NOTHING
