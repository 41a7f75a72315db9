SELECT call_id, role, consumed_seq FROM redo
WHERE session_id = :session_id AND incarnation = :incarnation
ORDER BY position
