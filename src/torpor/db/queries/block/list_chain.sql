-- A manifest and those below it, as far as they are stored as they are: the base's digest is bytes 5 to 36 of each.
WITH RECURSIVE chain (depth, digest, codec, data, blob) AS (
    SELECT 0, digest, codec, data, blob FROM block WHERE session_id = :session_id AND digest = :digest
    UNION ALL
    SELECT chain.depth + 1, block.digest, block.codec, block.data, block.blob
    FROM chain JOIN block ON block.session_id = :session_id AND block.digest = substr(chain.data, 5, 32)
    WHERE chain.depth < :depth_max
)
SELECT digest, codec, data, blob FROM chain ORDER BY depth
