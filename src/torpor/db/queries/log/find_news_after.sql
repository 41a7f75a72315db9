-- What an agent that only waits may have waited for.
SELECT seq FROM event
WHERE session_id = :session_id AND seq > :seq AND kind IN ('waitpoint.resolved', 'call.completed', 'call.failed')
LIMIT 1
