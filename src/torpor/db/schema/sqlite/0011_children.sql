-- Sessions that an agent has begun. (0010 is another part's.)

CREATE TABLE child (
    session_id   TEXT PRIMARY KEY REFERENCES session (session_id),
    parent_id    TEXT NOT NULL,                -- may be gone
    waitpoint_id TEXT NOT NULL,                -- the parent's, which its end resolves
    on_cancel    TEXT NOT NULL                 -- cancel or detach: what becomes of it when its parent is cancelled
) STRICT, WITHOUT ROWID;

CREATE INDEX child_parent ON child (parent_id);
