-- Output joins the end of its own incarnation's, or begins somewhere in what earlier ones wrote and supersedes the rest.
INSERT INTO output (session_id, channel, incarnation, position, data, wall_ns)
SELECT session_id, :channel, incarnation, :position, :data, :wall_ns
FROM session
WHERE session_id = :session_id AND owner_token = :owner_token AND incarnation = :incarnation
    AND COALESCE((
        SELECT CASE WHEN newest.incarnation = :incarnation THEN :position = newest.position + LENGTH(newest.data)
            ELSE :position <= newest.position + LENGTH(newest.data) END
        FROM output newest
        WHERE newest.session_id = :session_id AND newest.channel = :channel
        ORDER BY newest.incarnation DESC, newest.position DESC
        LIMIT 1), TRUE)
