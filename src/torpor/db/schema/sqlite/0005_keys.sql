-- Keys, wrapped by the master key, which is not in the database. Their ids tell nothing of them.

CREATE TABLE tenant (
    tenant_id    TEXT PRIMARY KEY,                          -- local
    key_id       TEXT NOT NULL,                             -- of its secret
    master_id    TEXT NOT NULL,                             -- of the master key that wraps it, and every session's key
    wrapped      BLOB NOT NULL                              -- see docs/snapshot-format.md
) STRICT, WITHOUT ROWID;

CREATE TABLE session_key (
    session_id   TEXT PRIMARY KEY REFERENCES session (session_id),
    key_id       TEXT NOT NULL,
    master_id    TEXT NOT NULL,
    wrapped      BLOB NOT NULL
) STRICT, WITHOUT ROWID;
