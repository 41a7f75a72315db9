SELECT session_id, number, checkpoint_id, snapshot_id, manifest_digest, damage
FROM checkpoint
ORDER BY session_id, number
