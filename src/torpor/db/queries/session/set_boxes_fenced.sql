UPDATE session SET inbox_from = :inbox, outbox_from = :outbox
WHERE session_id = :session_id AND owner_token = :owner_token
