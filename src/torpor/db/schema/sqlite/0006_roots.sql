-- Checkpoints that retention never forgets because somebody said so, and finding rows by the snapshot that they keep.

ALTER TABLE checkpoint ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0;

CREATE INDEX checkpoint_of_snapshot ON checkpoint (snapshot_id);
