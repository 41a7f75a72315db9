SELECT waitpoint.* FROM waitpoint JOIN session ON session.session_id = waitpoint.session_id
WHERE waitpoint.resolved_ns IS NULL AND session.status NOT IN ('succeeded', 'failed', 'cancelled')
ORDER BY waitpoint.created_ns, waitpoint.waitpoint_id
