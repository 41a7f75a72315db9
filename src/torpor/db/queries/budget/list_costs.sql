SELECT call.session_id, SUM(attempt.cost_nanousd) AS cost_nanousd
FROM call
JOIN attempt ON attempt.call_id = call.call_id
WHERE attempt.cost_nanousd IS NOT NULL
GROUP BY call.session_id
