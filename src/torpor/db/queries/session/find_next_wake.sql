-- The next time, and whether there is a session at all that anything but a person wakes.
SELECT min(CASE WHEN wake_ns > :wall_ns AND wake_ns < 9223372036854775807 THEN wake_ns END) AS wake_ns,
    count(*) AS sessions
FROM session
WHERE wake_ns IS NOT NULL
