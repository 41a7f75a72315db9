SELECT * FROM session WHERE wake_ns <= :wall_ns ORDER BY wake_ns, session_id
