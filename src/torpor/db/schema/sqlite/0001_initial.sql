-- The first schema: one session's rows hang on its session row and go with it.
-- JSON is kept as ASCII text, so that any string an agent sends (lone surrogates, NUL) can be stored.

CREATE TABLE session (
    session_id   TEXT PRIMARY KEY,
    name         TEXT UNIQUE,
    status       TEXT NOT NULL,
    spec         TEXT NOT NULL,                -- JSON
    owner_token  INTEGER NOT NULL,             -- rises at every acquisition; every write presents it
    node_id      TEXT,
    boot_id      TEXT,
    pid          INTEGER,
    incarnation  INTEGER NOT NULL,
    head_seq     INTEGER NOT NULL,
    head_hash    TEXT NOT NULL,
    cursor_seq   INTEGER NOT NULL,             -- the last context event of the current branch, 0 before the first
    created_ns   INTEGER NOT NULL,
    updated_ns   INTEGER NOT NULL,
    exit_status  INTEGER
) STRICT;

CREATE TABLE event (
    session_id   TEXT NOT NULL REFERENCES session (session_id),
    seq          INTEGER NOT NULL,
    parent_seq   INTEGER,
    incarnation  INTEGER NOT NULL,
    wall_ns      INTEGER NOT NULL,
    kind         TEXT NOT NULL,
    call_id      TEXT,
    data         TEXT NOT NULL,                -- JSON object
    refs         TEXT NOT NULL,                -- JSON array of SHA-256 digests, hex
    prev_hash    TEXT NOT NULL,
    hash         TEXT NOT NULL,
    PRIMARY KEY (session_id, seq)
) STRICT, WITHOUT ROWID;

CREATE TABLE call (
    call_id       TEXT PRIMARY KEY,
    session_id    TEXT NOT NULL REFERENCES session (session_id),
    state         TEXT NOT NULL,
    key_exact     TEXT NOT NULL,
    key_canonical TEXT NOT NULL,
    key_logical   TEXT NOT NULL,
    about         TEXT NOT NULL,               -- JSON: dialect, method, target, model, is_llm
    incarnation   INTEGER NOT NULL,
    stream        INTEGER NOT NULL,
    request_bytes INTEGER NOT NULL,
    intended_seq  INTEGER NOT NULL,
    ended_seq     INTEGER,
    usage         TEXT NOT NULL,               -- JSON object
    UNIQUE (session_id, intended_seq)
) STRICT, WITHOUT ROWID;

CREATE TABLE attempt (
    call_id      TEXT NOT NULL REFERENCES call (call_id),
    number       INTEGER NOT NULL,             -- counts from 1
    sent_ns      INTEGER NOT NULL,
    head         TEXT,                         -- JSON, null until the upstream answered
    chunk_count  INTEGER,                      -- null while chunks may still come
    body_bytes   INTEGER,
    finished     INTEGER NOT NULL,             -- 1: the answer ended properly and call.completed is in the log
    PRIMARY KEY (call_id, number)
) STRICT, WITHOUT ROWID;

CREATE TABLE chunk (
    call_id      TEXT NOT NULL,
    attempt      INTEGER NOT NULL,
    number       INTEGER NOT NULL,             -- counts from 0
    offset_ns    INTEGER NOT NULL,             -- since the attempt was sent
    data         BLOB NOT NULL,                -- raw upstream bytes
    PRIMARY KEY (call_id, attempt, number),
    FOREIGN KEY (call_id, attempt) REFERENCES attempt (call_id, number)
) STRICT, WITHOUT ROWID;

CREATE TABLE block (
    session_id   TEXT NOT NULL REFERENCES session (session_id),
    digest       BLOB NOT NULL,                -- SHA-256 of the content
    codec        TEXT NOT NULL,                -- raw, zstd, or redacted
    size_bytes   INTEGER NOT NULL,             -- of the content
    data         BLOB NOT NULL,
    PRIMARY KEY (session_id, digest)
) STRICT;

CREATE TABLE request (
    call_id      TEXT PRIMARY KEY REFERENCES call (call_id),
    session_id   TEXT NOT NULL REFERENCES session (session_id),
    number       INTEGER NOT NULL,             -- counts from 1 in the session
    head         TEXT NOT NULL,                -- JSON: method, target, headers
    manifest     BLOB NOT NULL,                -- digest of the block that lists the body's pieces
    body_digest  TEXT NOT NULL,                -- SHA-256 of the body, hex
    body_bytes   INTEGER NOT NULL,
    UNIQUE (session_id, number)
) STRICT, WITHOUT ROWID;

CREATE TABLE checkpoint (
    checkpoint_id   TEXT PRIMARY KEY,
    session_id      TEXT NOT NULL REFERENCES session (session_id),
    number          INTEGER NOT NULL,
    seq             INTEGER NOT NULL,          -- the log head at the cut
    committed_seq   INTEGER NOT NULL,          -- its own checkpoint.committed event
    cursor_seq      INTEGER NOT NULL,
    incarnation     INTEGER NOT NULL,
    snapshot_id     TEXT NOT NULL,
    manifest_digest TEXT NOT NULL,
    has_memory      INTEGER NOT NULL,
    open_streams    TEXT NOT NULL,             -- JSON array
    next_stream     INTEGER NOT NULL,
    stdout_bytes    INTEGER NOT NULL,
    stderr_bytes    INTEGER NOT NULL,
    reason          TEXT NOT NULL,
    wall_ns         INTEGER NOT NULL,
    freeze_ns       INTEGER NOT NULL,
    commit_ns       INTEGER NOT NULL,
    raw_bytes       INTEGER NOT NULL,
    stored_bytes    INTEGER NOT NULL,
    pending_redo    TEXT NOT NULL,             -- JSON array of call ids
    joinable        TEXT NOT NULL,             -- JSON array of call ids
    damage          TEXT,                      -- why it does not restore, null while it is believed to
    UNIQUE (session_id, number)
) STRICT, WITHOUT ROWID;

CREATE TABLE redo (
    session_id    TEXT NOT NULL REFERENCES session (session_id),
    incarnation   INTEGER NOT NULL,
    position      INTEGER NOT NULL,
    call_id       TEXT NOT NULL,
    role          TEXT NOT NULL,               -- pending, joinable or attached
    consumed_seq  INTEGER,                     -- the log head when it was consumed, null while it is pending
    PRIMARY KEY (session_id, incarnation, position),
    UNIQUE (session_id, incarnation, call_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE output (
    session_id   TEXT NOT NULL REFERENCES session (session_id),
    channel      INTEGER NOT NULL,             -- 1 stdout, 2 stderr
    incarnation  INTEGER NOT NULL,
    position     INTEGER NOT NULL,             -- of the first byte, in the channel's whole text
    data         BLOB NOT NULL,
    wall_ns      INTEGER NOT NULL,
    PRIMARY KEY (session_id, channel, incarnation, position)
) STRICT, WITHOUT ROWID;

-- One row that a durable transaction bumps when it changed nothing else: only a changed page is synced.
CREATE TABLE durability (
    mark  INTEGER NOT NULL
) STRICT;

INSERT INTO durability (mark) VALUES (0);
