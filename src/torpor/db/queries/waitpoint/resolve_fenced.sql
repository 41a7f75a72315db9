-- The first resolution wins.
UPDATE waitpoint SET resolved_ns = :wall_ns, resolution = :resolution
WHERE waitpoint_id = :waitpoint_id AND session_id = :session_id AND resolved_ns IS NULL
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
