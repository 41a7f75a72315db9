"""What the gateway must know of one provider's HTTP API, and nothing more: bytes pass unchanged whatever they say.

A dialect reads copies. A request or an answer that it does not understand is carried all the same; what it can't be
trusted with is only whether an answer is complete, and then the transport's word counts.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from torpor.config import Family


class Shape(StrEnum):
    """How a client gets an answer."""

    AS_SENT = "as_sent"
    MESSAGE = "message"
    """In one piece of JSON."""
    EVENTS = "events"
    """As server-sent events."""
    ARRAY = "array"
    """The events as one array of JSON (Gemini's stream without alt=sse)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A request that an upstream takes.

    Attributes:
        path: as the provider's documentation spells it, with its /v1.
        is_llm: a model thinks for it, so it costs and a checkpoint fits.
        model: the model, where the path names it and not the body.
        shape: how the client wants the answer, where the address says so and not the body.
    """

    path: str
    is_llm: bool
    model: str | None = None
    shape: Shape | None = None


@dataclass(slots=True, kw_only=True)
class AnswerFacts:
    """What an answer said of itself.

    Attributes:
        response_id: what the provider calls this answer, if it can be asked for by that name later.
        terminal: the event, or the whole JSON, that ends an answer of this API was there.
        error: it reported its own failure, in-band.
        usage: token counts: input_tokens (the whole prompt), output_tokens, cache_read_input_tokens,
            cache_creation_input_tokens, cache_creation_1h_input_tokens (a part of it), reasoning_output_tokens; those
            that were said.
        terms: service_tier and speed, which change the price, as the provider names them.
    """

    terminal: bool = False
    error: bool = False
    finish_reason: str | None = None
    response_id: str | None = None
    usage: dict[str, int] = field(default_factory=dict[str, int])
    terms: dict[str, str] = field(default_factory=dict[str, str])


class Dialect(Protocol):
    """One API of one provider family.

    Attributes:
        name: keys the matching rules of `core.match`.
        family: whose upstreams speak it; None if configured paths say which upstream, or it is Torpor's own.
        last_event: data of an event that is no JSON and ends every stream.
        opaque: nothing is known of its answers, so the transport's word counts.
        counts_if_asked: its streams have token counts only if `stream_options` asks for them.
    """

    name: str
    family: Family | None
    last_event: bytes | None
    opaque: bool
    counts_if_asked: bool

    def route(self, method: str, path: str, query: str) -> Route | None:
        """Where a request goes; None if this API has no such request, or not for agents."""
        ...

    def read_event(self, event: Mapping[str, Any], facts: AnswerFacts) -> None:
        """Take in the data of one server-sent event."""
        ...

    def read_message(self, message: Mapping[str, Any], facts: AnswerFacts) -> None:
        """Take in an answer that came in one piece."""
        ...

    def to_message(self, events: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, Any]]:
        """A streamed answer in one piece: its status, and its JSON."""
        ...

    def to_events(self, message: Mapping[str, Any]) -> bytes:
        """An answer that came in one piece as the events of a streamed one."""
        ...

    def error(self, *, status: int, code: str, message: str) -> dict[str, Any]:
        """An error of the gateway's own, in the shape that this API's clients understand."""
        ...


def count(source: Mapping[str, Any], name: str, into: dict[str, int], key: str) -> None:
    """Copy a token count if it is one."""
    value = source.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        into[key] = value


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}  # pyright: ignore[reportUnknownVariableType]


def items(value: object) -> list[Any]:
    """The value if it is a JSON array, else an empty one."""
    return value if isinstance(value, list) else []  # pyright: ignore[reportUnknownVariableType]


def model_named(path: str, *, segments_max: int) -> str | None:
    """The model that a path below /v1/models/ names: plain characters, and nothing that climbs out of it."""
    name = path.removeprefix("/v1/models/")
    if name == path or name.count("/") >= segments_max:
        return None
    return name if all(map(is_plain_segment, name.split("/"))) else None


def is_plain_segment(segment: str) -> bool:
    """Whether a segment of a path is itself wherever it is read: nothing encoded, no dots alone."""
    return _SEGMENT.fullmatch(segment) is not None and bool(segment.strip("."))


_SEGMENT = re.compile(r"[A-Za-z0-9._:@~+-]+")
