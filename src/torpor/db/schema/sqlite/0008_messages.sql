-- Messages to a session and from it, and waitpoints that come to a time.

ALTER TABLE waitpoint ADD COLUMN due_ns INTEGER;            -- when it resolves by itself; null: never

CREATE TABLE message (
    session_id   TEXT NOT NULL REFERENCES session (session_id),
    box          TEXT NOT NULL,                             -- in or out
    number       INTEGER NOT NULL,                          -- counts from 1 in its box
    seq          INTEGER NOT NULL,                          -- of its event, which names the block of its text
    wall_ns      INTEGER NOT NULL,
    digest       BLOB NOT NULL,                             -- of that block
    size_bytes   INTEGER NOT NULL,                          -- of the text
    call_id      TEXT,                                      -- in: the call that handled it, null while none did; out: that sent it
    PRIMARY KEY (session_id, box, number)
) STRICT, WITHOUT ROWID;

CREATE INDEX waitpoint_open ON waitpoint (created_ns) WHERE resolved_ns IS NULL;
