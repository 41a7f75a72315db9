"""JSON columns: ASCII text with sorted keys, so that every string (an agent may send any) survives the round trip."""

import json
from typing import Any

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def encode_json(value: object) -> str:
    return _ENCODER.encode(value)


def decode_json(text: str) -> Any:
    return json.loads(text)
