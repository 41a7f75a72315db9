INSERT INTO waitpoint (waitpoint_id, session_id, kind, call_id, data, created_ns, resolved_ns, resolution)
VALUES (:waitpoint_id, :session_id, :kind, :call_id, :data, :created_ns, :resolved_ns, :resolution)
