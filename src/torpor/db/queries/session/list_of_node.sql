SELECT * FROM session WHERE node_id = :node_id ORDER BY session_id
