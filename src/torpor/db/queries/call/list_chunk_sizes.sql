-- Of an answer that has its row.
SELECT number, length(data) AS size_bytes FROM chunk
WHERE call_id = :call_id AND attempt = :attempt
    AND EXISTS (SELECT 1 FROM answer WHERE answer.call_id = :call_id AND answer.attempt = :attempt)
ORDER BY number
