SELECT COALESCE(SUM(length(data)), 0) AS body_bytes FROM chunk WHERE call_id = :call_id AND attempt = :attempt
