SELECT session_id FROM watermark
