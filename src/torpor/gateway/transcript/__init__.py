"""What a model saw and what it answered, read out of a call's bytes for people: the same shape for every dialect.

Readers work on copies of logged bytes, decide nothing, and refuse nothing: what a dialect's reader does not know stays
there as JSON, and bytes that are no JSON stay as text. Everything in it is hostile: print it escaped.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torpor.gateway.dialects.base import mapping
from torpor.gateway.dialects.sse import EventSplitter, json_object
from torpor.gateway.transcript import anthropic, gemini, openai_chat, openai_responses
from torpor.gateway.transcript.model import Answered, Asked, Message, Part, Reader

_READERS: Mapping[str, Reader] = {
    "anthropic": anthropic,
    "openai_chat": openai_chat,
    "openai_responses": openai_responses,
    "gemini": gemini,
}
_DECODED_BYTES_MAX = 256 << 20

__all__ = ["Answered", "Asked", "Message", "Part", "read_answer", "read_request"]


def read_request(dialect: str, body: bytes) -> Asked:
    """A request's system prompt, tools and messages. `body` without content-encoding."""
    fields = json_object(body)
    reader = _READERS.get(dialect)
    if fields is None or reader is None:
        return Asked(messages=(_as_it_is("user", body, fields),) if body else ())
    try:
        return reader.asked(fields)
    except (AttributeError, KeyError, TypeError, ValueError):
        return Asked(messages=(_as_it_is("user", body, fields),))


def read_answer(dialect: str, body: bytes) -> Answered:
    """The message that an answer is, streamed or not, as far as it came."""
    reader = _READERS.get(dialect)
    whole = json_object(body)
    events = [] if whole is not None else list(_events(body))
    if reader is None or (whole is None and not events):
        return Answered(message=_as_it_is("assistant", body, whole))
    try:
        if whole is not None and "error" in whole and whole["error"]:
            return Answered(message=_as_it_is("error", body, whole))
        return reader.answered([whole] if whole is not None else events, streamed=whole is None)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        return Answered(message=_as_it_is("assistant", body, whole))


def _events(body: bytes) -> Iterable[Mapping[str, Any]]:
    """The JSON objects of server-sent events, of lines, or of one array."""
    array = json_object(b'{"events":' + body + b"}") if body.lstrip()[:1] == b"[" else None
    if array is not None:
        yield from (mapping(item) for item in array["events"])
        return
    raw = body.splitlines() if body.lstrip()[:1] == b"{" else EventSplitter().feed(body + b"\n\n")
    for data in raw:
        event = json_object(data)
        if event is not None:
            yield event


def _as_it_is(role: str, body: bytes, fields: Mapping[str, Any] | None) -> Message:
    part = Part(kind="text", text=body.decode(errors="replace")) if fields is None else Part(kind="other", data=fields)
    return Message(role=role, parts=(part,))
