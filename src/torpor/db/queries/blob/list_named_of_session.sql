SELECT session_id, blob FROM block WHERE session_id = :session_id AND blob IS NOT NULL
UNION
SELECT call.session_id, answer.blob FROM call JOIN answer ON answer.call_id = call.call_id
WHERE call.session_id = :session_id AND answer.blob IS NOT NULL
