"""JSON columns: ASCII text with sorted keys, so that every string (an agent may send any) survives the round trip."""

import json
from typing import Any


def encode_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def decode_json(text: str) -> Any:
    return json.loads(text)
