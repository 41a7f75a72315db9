"""What the gateway must know of one provider's HTTP API, and nothing more: bytes pass unchanged whatever they say.

A dialect reads copies. A request or an answer that it does not understand is carried all the same; what it can't be
trusted with is only whether an answer is complete, and then the transport's word counts.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torpor.config import Family


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A request that an upstream takes.

    Attributes:
        path: where it goes below the upstream's base URL.
        is_llm: a model thinks for it, so it costs and a checkpoint fits.
    """

    path: str
    is_llm: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFacts:
    model: str | None = None
    stream: bool = False


@dataclass(slots=True, kw_only=True)
class AnswerFacts:
    """What an answer said of itself.

    Attributes:
        terminal: the event, or the whole JSON, that ends an answer of this API was there.
        error: it reported its own failure, in-band.
        usage: token counts: input_tokens (the whole prompt), output_tokens, cache_read_input_tokens,
            cache_creation_input_tokens, reasoning_output_tokens; those that were said.
    """

    terminal: bool = False
    error: bool = False
    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict[str, int])


class Dialect(Protocol):
    """One API of one provider family.

    Attributes:
        name: keys the matching rules of `core.match`.
        family: whose upstreams speak it; None: no upstream does.
        last_event: data of an event that is no JSON and ends every stream.
    """

    name: str
    family: Family | None
    last_event: bytes | None

    def route(self, method: str, path: str) -> Route | None:
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


def is_model_path(path: str, *, segments_max: int) -> bool:
    """Whether a path names one model: plain characters, and nothing that climbs out of /v1/models/."""
    name = path.removeprefix("/v1/models/").split("/")
    plain = all(_SEGMENT.fullmatch(segment) and segment.strip(".") for segment in name)
    return path.startswith("/v1/models/") and len(name) <= segments_max and plain


_SEGMENT = re.compile(r"[A-Za-z0-9._:@~+-]+")
