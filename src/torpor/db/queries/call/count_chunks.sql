-- Chunks are numbered without gaps.
SELECT COALESCE(MAX(number), -1) + 1 AS chunk_count FROM chunk WHERE call_id = :call_id AND attempt = :attempt
