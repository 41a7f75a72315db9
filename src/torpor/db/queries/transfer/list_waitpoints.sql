SELECT waitpoint_id, session_id, kind, call_id, data, created_ns, resolved_ns, resolution
FROM waitpoint
WHERE session_id = :session_id
ORDER BY created_ns, waitpoint_id
