-- When a node is to run a session that none runs.

-- Wall time; 0: now; 2^63-1: when what it waits for is resolved; null: only when a person says so.
ALTER TABLE session ADD COLUMN wake_ns INTEGER;

CREATE INDEX session_wake ON session (wake_ns) WHERE wake_ns IS NOT NULL;
