-- An attempt that ended without a cost counts with what was reserved for it.
SELECT session.budget_nanousd,
    COALESCE(SUM(COALESCE(attempt.cost_nanousd,
        CASE WHEN attempt.chunk_count IS NULL THEN 0 ELSE attempt.reserved_nanousd END)), 0) AS spent_nanousd,
    COALESCE(SUM(CASE WHEN attempt.cost_nanousd IS NULL AND attempt.chunk_count IS NULL
        THEN attempt.reserved_nanousd END), 0) AS reserved_nanousd
FROM session
LEFT JOIN call ON call.session_id = session.session_id
LEFT JOIN attempt ON attempt.call_id = call.call_id
WHERE session.session_id = :session_id
GROUP BY session.session_id
