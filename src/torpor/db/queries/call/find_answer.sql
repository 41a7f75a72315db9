SELECT codec, layout, data, blob FROM answer WHERE call_id = :call_id AND attempt = :attempt
