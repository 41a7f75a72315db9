-- Nobody has acquired it here.
INSERT INTO session (session_id, name, status, spec, incarnation, head_seq, head_hash, cursor_seq, created_ns, updated_ns,
    exit_status, budget_nanousd, parent_id, forked_at_seq, inbox_from, outbox_from, owner_token)
VALUES (:session_id, :name, :status, :spec, :incarnation, :head_seq, :head_hash, :cursor_seq, :created_ns,
    :updated_ns, :exit_status, :budget_nanousd, :parent_id, :forked_at_seq, :inbox_from, :outbox_from, 0)
