"""Gives a recorded answer in the shape that a retry asked for: a client that falls back from streaming pays once.

Like delivery as it was sent, this is a pure function of the log's rows and of the shape in the stream's claim. Only
proper answers are reshaped: an error of the provider is one message in both shapes and passes as it is.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torpor.core.call import ResponseHead
from torpor.gateway.dialects.base import Dialect, Shape, items, mapping
from torpor.gateway.dialects.sse import EventSplitter, event_bytes, json_object, json_value

_KINDS = {
    Shape.MESSAGE: "application/json",
    Shape.EVENTS: "text/event-stream; charset=utf-8",
    Shape.ARRAY: "application/json",
}


def reshaped(
    dialect: Dialect, shape: Shape, head: ResponseHead, chunks: list[bytes]
) -> tuple[ResponseHead, bytes] | None:
    """A whole answer in another shape; None if it has that shape, or makes no sense, and goes as it was sent."""
    if head.status != 200 or dialect.opaque:
        return None
    body = b"".join(chunks)
    try:
        recorded = _recorded_shape(head, body)
        if recorded in {None, shape, Shape.AS_SENT} or shape is Shape.AS_SENT:
            return None
        status, other = _in_shape(dialect, shape, recorded, body)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return None  # The provider's events make no message: a client may still make sense of them.
    head = _with_body(head, status, _KINDS[shape] if status == 200 else _KINDS[Shape.MESSAGE])
    # A whole message has its counts, and so have the events that are made of it.
    return replace(head, usage_asked=dialect.counts_if_asked), other


def _recorded_shape(head: ResponseHead, body: bytes) -> Shape | None:
    match content_type(head):
        case "text/event-stream":
            return Shape.EVENTS
        case "application/json":
            return Shape.ARRAY if body.lstrip()[:1] == b"[" else Shape.MESSAGE
        case _:
            return None


def _in_shape(dialect: Dialect, shape: Shape, recorded: Shape | None, body: bytes) -> tuple[int, bytes]:
    """The status and the body; a whole answer is first streamed, and everything else follows from events."""
    streamed = dialect.to_events(json_object(body) or {}) if recorded is Shape.MESSAGE else body
    if recorded is Shape.MESSAGE and shape is Shape.EVENTS:
        return 200, streamed
    events = _elements(body) if recorded is Shape.ARRAY else _parsed(streamed)
    match shape:
        case Shape.MESSAGE:
            status, message = dialect.to_message(events)
            return status, json.dumps(message, ensure_ascii=False).encode()
        case Shape.ARRAY:
            return 200, json.dumps(events, ensure_ascii=False).encode()
        case _:
            return 200, b"".join(map(event_bytes, events))


def _elements(body: bytes) -> list[Mapping[str, Any]]:
    return [mapping(item) for item in items(json_value(body))]


def _parsed(streamed: bytes) -> list[Mapping[str, Any]]:
    """The events in a stream's bytes. A provider that forgot the last empty line has sent all that it had."""
    raws = EventSplitter().feed(streamed + b"\n\n")
    return [event for raw in raws if (event := json_object(raw)) is not None]


def has_events(head: ResponseHead) -> bool:
    """Whether the body is a stream of events that can be read as it comes."""
    encoded = any(name.lower() == "content-encoding" and value.lower() != "identity" for name, value in head.headers)
    return content_type(head) == "text/event-stream" and not encoded


def content_type(head: ResponseHead) -> str:
    value = next((value for name, value in head.headers if name.lower() == "content-type"), "")
    return value.partition(";")[0].strip().lower()


def _with_body(head: ResponseHead, status: int, kind: str) -> ResponseHead:
    headers = tuple((name, value) for name, value in head.headers if name.lower() != "content-type")
    reason = head.reason if status == head.status else "Error"
    return replace(head, status=status, reason=reason, headers=(("content-type", kind), *headers))
