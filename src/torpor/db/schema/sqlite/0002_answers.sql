-- The chunks of a closed attempt in one row, and the heads of requests among the blocks, where equal ones are one.

CREATE TABLE answer (
    call_id      TEXT NOT NULL,
    attempt      INTEGER NOT NULL,
    codec        TEXT NOT NULL,                -- raw or zstd; redacted-raw or redacted-zstd when bytes of it were masked
    layout       BLOB NOT NULL,                -- where its chunks end and when they came, see docs/event-log.md
    data         BLOB NOT NULL,                -- raw upstream bytes
    PRIMARY KEY (call_id, attempt),
    FOREIGN KEY (call_id, attempt) REFERENCES attempt (call_id, number)
) STRICT;

ALTER TABLE request ADD COLUMN head_digest BLOB; -- of the block that holds the head; null where `head` itself does
