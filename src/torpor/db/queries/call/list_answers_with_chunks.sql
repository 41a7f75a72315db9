-- Answers whose chunks a kill kept from being dropped.
SELECT answer.call_id, answer.attempt FROM call JOIN answer ON answer.call_id = call.call_id
WHERE call.session_id = :session_id
    AND EXISTS (SELECT 1 FROM chunk WHERE chunk.call_id = answer.call_id AND chunk.attempt = answer.attempt)
