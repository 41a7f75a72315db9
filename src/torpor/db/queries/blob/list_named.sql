-- Every object that a row names, with the session that it belongs to.
SELECT session_id, blob FROM block WHERE blob IS NOT NULL
UNION
SELECT call.session_id, answer.blob FROM answer JOIN call ON call.call_id = answer.call_id WHERE answer.blob IS NOT NULL
