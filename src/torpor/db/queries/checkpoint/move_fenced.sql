UPDATE checkpoint SET snapshot_id = :snapshot_id, manifest_digest = :manifest_digest
WHERE session_id = :session_id AND checkpoint_id = :checkpoint_id AND snapshot_id = :seen_snapshot_id
    AND EXISTS (SELECT 1 FROM session WHERE session_id = :session_id AND owner_token = :owner_token)
