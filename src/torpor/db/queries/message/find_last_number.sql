-- A fork's numbers go on where its parent's were; the messages that it has from there have lower ones.
SELECT COALESCE(
    (SELECT MAX(number) FROM message WHERE session_id = :session_id AND box = :box
        AND number > COALESCE(CASE :box WHEN 'in' THEN inbox_from ELSE outbox_from END, 0)),
    CASE :box WHEN 'in' THEN inbox_from ELSE outbox_from END,
    0) AS number
FROM session
WHERE session_id = :session_id
