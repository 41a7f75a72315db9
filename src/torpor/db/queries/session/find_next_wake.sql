SELECT min(wake_ns) AS wake_ns FROM session
WHERE wake_ns > :wall_ns AND wake_ns < 9223372036854775807
