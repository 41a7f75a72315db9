-- The search index, a file of its own: derived from the log, filled when somebody searches, and deleted at any time.

CREATE VIRTUAL TABLE found USING fts5 (
    content, session_id UNINDEXED, seq UNINDEXED, turn UNINDEXED, source UNINDEXED,
    tokenize = 'unicode61 remove_diacritics 2'
);

CREATE TABLE watermark (
    session_id   TEXT PRIMARY KEY,
    seq          INTEGER NOT NULL,             -- events up to here are in the index
    turn         INTEGER NOT NULL,             -- model calls among them
    output       TEXT NOT NULL                 -- JSON: by channel, incarnation and position of the newest piece
) STRICT, WITHOUT ROWID;
