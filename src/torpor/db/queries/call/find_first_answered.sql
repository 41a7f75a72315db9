-- Calls that are equal in meaning, of whatever branch: what happened outside is not undone by going back.
SELECT call_id FROM call
WHERE session_id = :session_id AND key_canonical = :key_canonical AND state = 'answered'
ORDER BY intended_seq
LIMIT 1
