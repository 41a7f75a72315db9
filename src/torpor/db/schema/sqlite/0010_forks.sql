-- Forks and rewinds: which checkpoints a rewind left, where the numbers of a fork's messages go on, and waitpoints whose
-- ids a fork has from its parent, whose memory names them.

ALTER TABLE checkpoint ADD COLUMN left_seq INTEGER;         -- the session.rewound that left it; null: on the present path

ALTER TABLE session ADD COLUMN inbox_from INTEGER;          -- of a fork: the last number that its past had used; else null
ALTER TABLE session ADD COLUMN outbox_from INTEGER;

CREATE TABLE waitpoint_of (
    waitpoint_id  TEXT NOT NULL,
    session_id    TEXT NOT NULL REFERENCES session (session_id),
    kind          TEXT NOT NULL,                            -- budget, ask, timer, message
    call_id       TEXT,                                     -- the call that made it, or that it holds
    data          TEXT NOT NULL,                            -- JSON: what it waits for
    created_ns    INTEGER NOT NULL,
    resolved_ns   INTEGER,                                  -- null while it is open; the first resolution wins
    resolution    TEXT,                                     -- JSON
    due_ns        INTEGER,                                  -- when it resolves by itself; null: never
    PRIMARY KEY (session_id, waitpoint_id)
) STRICT, WITHOUT ROWID;

INSERT INTO waitpoint_of (waitpoint_id, session_id, kind, call_id, data, created_ns, resolved_ns, resolution, due_ns)
SELECT waitpoint_id, session_id, kind, call_id, data, created_ns, resolved_ns, resolution, due_ns FROM waitpoint;

DROP TABLE waitpoint;

ALTER TABLE waitpoint_of RENAME TO waitpoint;

CREATE INDEX waitpoint_of_session ON waitpoint (session_id, created_ns);
CREATE INDEX waitpoint_open ON waitpoint (created_ns) WHERE resolved_ns IS NULL;
