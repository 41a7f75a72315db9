SELECT * FROM message WHERE session_id = :session_id AND box = :box AND number > :number ORDER BY number
