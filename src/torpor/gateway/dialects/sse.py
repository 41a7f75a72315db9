"""Server-sent events: cut out of a stream of bytes, and written."""

import json
from collections.abc import Mapping
from typing import Any, cast


class EventSplitter:
    """Feed it bytes in order; it gives the data of each event that became complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._data: list[bytes] = []

    @property
    def buffered_bytes(self) -> int:
        return len(self._buffer) + sum(map(len, self._data))

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        events: list[bytes] = []
        for line in lines:
            field = bytes(line.removesuffix(b"\r"))
            if field.startswith(b"data:"):
                self._data.append(field[5:].removeprefix(b" "))
            elif not field and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events


def json_value(raw: bytes) -> Any:
    """What these bytes are as JSON; None if they are none."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def json_object(raw: bytes) -> Mapping[str, Any] | None:
    """The JSON object that these bytes are, if they are one."""
    value = json_value(raw)
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else None


def event_bytes(data: object, *, name: str = "") -> bytes:
    prefix = f"event: {name}\n" if name else ""
    return f"{prefix}data: {json.dumps(data, separators=(',', ':'), ensure_ascii=False)}\n\n".encode()
