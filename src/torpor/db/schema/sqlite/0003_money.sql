-- What calls cost, what a session may spend, and the waitpoints that a session waits on.

ALTER TABLE session ADD COLUMN budget_nanousd INTEGER;      -- null: no limit

ALTER TABLE attempt ADD COLUMN reserved_nanousd INTEGER;    -- its worst case, when it was sent under a budget
ALTER TABLE attempt ADD COLUMN cost_nanousd INTEGER;        -- null until it ended, and where nobody knows

CREATE TABLE waitpoint (
    waitpoint_id  TEXT PRIMARY KEY,
    session_id    TEXT NOT NULL REFERENCES session (session_id),
    kind          TEXT NOT NULL,                            -- budget
    call_id       TEXT,                                     -- the call that it holds, if it holds one
    data          TEXT NOT NULL,                            -- JSON: what it waits for
    created_ns    INTEGER NOT NULL,
    resolved_ns   INTEGER,                                  -- null while it is open; the first resolution wins
    resolution    TEXT                                      -- JSON
) STRICT, WITHOUT ROWID;

CREATE INDEX waitpoint_of_session ON waitpoint (session_id, created_ns);
