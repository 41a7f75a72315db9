UPDATE session SET budget_nanousd = :budget_nanousd, updated_ns = :wall_ns
WHERE session_id = :session_id AND owner_token = :owner_token
