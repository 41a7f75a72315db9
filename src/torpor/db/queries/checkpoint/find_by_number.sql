SELECT * FROM checkpoint WHERE session_id = :session_id AND number = :number
