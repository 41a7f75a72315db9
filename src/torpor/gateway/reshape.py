"""Gives a recorded answer in the shape that a retry asked for: a client that falls back from streaming pays once.

Like delivery as it was sent, this is a pure function of the log's rows and of the shape in the stream's claim. Only
proper answers are reshaped: an error of the provider is one message in both shapes and passes as it is.
"""

import json
from dataclasses import replace
from enum import StrEnum

from torpor.core.call import ResponseHead
from torpor.gateway.dialects.base import Dialect
from torpor.gateway.dialects.sse import EventSplitter, json_object


class Shape(StrEnum):
    """How a stream gets its call's answer."""

    AS_SENT = "as_sent"
    MESSAGE = "message"
    """In one piece of JSON."""
    EVENTS = "events"
    """As server-sent events."""


def reshaped(
    dialect: Dialect, shape: Shape, head: ResponseHead, chunks: list[bytes]
) -> tuple[ResponseHead, bytes] | None:
    """A whole answer in another shape; None if it has that shape, or makes no sense, and goes as it was sent."""
    kind = content_type(head)
    body = b"".join(chunks)
    if head.status != 200:
        return None
    try:
        if shape is Shape.MESSAGE and kind == "text/event-stream":
            events = [event for raw in EventSplitter().feed(body) if (event := json_object(raw)) is not None]
            status, message = dialect.to_message(events)
            return _with_body(head, status, "application/json"), json.dumps(message, ensure_ascii=False).encode()
        if shape is Shape.EVENTS and kind == "application/json":
            whole = json_object(body) or {}
            return _with_body(head, 200, "text/event-stream; charset=utf-8"), dialect.to_events(whole)
    except (AttributeError, LookupError, TypeError, ValueError):
        return None  # The provider's events make no message: a client may still make sense of them.
    return None


def content_type(head: ResponseHead) -> str:
    value = next((value for name, value in head.headers if name.lower() == "content-type"), "")
    return value.partition(";")[0].strip().lower()


def _with_body(head: ResponseHead, status: int, kind: str) -> ResponseHead:
    headers = tuple((name, value) for name, value in head.headers if name.lower() != "content-type")
    reason = head.reason if status == head.status else "Error"
    return replace(head, status=status, reason=reason, headers=(("content-type", kind), *headers))
