-- Nothing wakes a session that has ended or is lost.
UPDATE session
SET status = :status, exit_status = COALESCE(:exit_status, exit_status), updated_ns = :wall_ns,
    wake_ns = CASE WHEN :status IN ('succeeded', 'failed', 'cancelled', 'lost') THEN NULL ELSE wake_ns END
WHERE session_id = :session_id AND owner_token = :owner_token AND status = :seen_status
