SELECT seq, parent_seq FROM event
WHERE session_id = :session_id AND kind IN ('session.created', 'call.intended')
ORDER BY seq
