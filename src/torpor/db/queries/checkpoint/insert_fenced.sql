INSERT INTO checkpoint (checkpoint_id, session_id, number, seq, committed_seq, cursor_seq, incarnation, snapshot_id,
    manifest_digest, has_memory, open_streams, next_stream, stdout_bytes, stderr_bytes, reason, wall_ns, freeze_ns,
    commit_ns, raw_bytes, stored_bytes, pending_redo, joinable)
SELECT :checkpoint_id, session_id, :number, :seq, :committed_seq, :cursor_seq, :incarnation, :snapshot_id,
    :manifest_digest, :has_memory, :open_streams, :next_stream, :stdout_bytes, :stderr_bytes, :reason, :wall_ns, :freeze_ns,
    :commit_ns, :raw_bytes, :stored_bytes, :pending_redo, :joinable
FROM session
WHERE session_id = :session_id AND owner_token = :owner_token AND :seq < head_seq AND :cursor_seq <= :seq
    AND :number > (SELECT COALESCE(MAX(number), -1) FROM checkpoint WHERE session_id = :session_id)
