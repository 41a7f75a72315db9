SELECT codec, layout, data FROM answer WHERE call_id = :call_id AND attempt = :attempt
