-- Where a session comes from. Its parent may be forgotten before it, so nothing refers to the parent's row.

ALTER TABLE session ADD COLUMN parent_id TEXT;              -- null: it began by itself
ALTER TABLE session ADD COLUMN forked_at_seq INTEGER;       -- the last event of the parent that is its past too

CREATE INDEX session_of_parent ON session (parent_id) WHERE parent_id IS NOT NULL;
