UPDATE session
SET status = :status, exit_status = COALESCE(:exit_status, exit_status), updated_ns = :wall_ns
WHERE session_id = :session_id AND owner_token = :owner_token AND status = :seen_status
