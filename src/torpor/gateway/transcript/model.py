"""The values that every dialect is read into, and what a reader is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

PartKind = Literal["text", "thinking", "tool_call", "tool_result", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One piece of a message.

    Attributes:
        text: of a text, a thought, a tool's arguments (JSON) or its result.
        tool_id: joins a tool call with its result, where the dialect has such an id.
        name: of the tool that is called.
        is_error: the result says that the tool failed.
        data: what has no text (an image, something unknown), as it stands in the request.
    """

    kind: PartKind
    text: str = ""
    tool_id: str | None = None
    name: str | None = None
    is_error: bool = False
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the model saw.

    Attributes:
        tools: each tool's name, with its whole definition.
        settings: every other field of the request (model, limits, temperature).
    """

    system: tuple[Part, ...] = ()
    tools: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    messages: tuple[Message, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What it answered; `usage` as the provider wrote it."""

    message: Message
    model: str | None = None
    response_id: str | None = None
    finish_reason: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Reader(Protocol):
    """One dialect. Raises KeyError, TypeError, ValueError or AttributeError for what it does not understand."""

    def asked(self, fields: Mapping[str, Any]) -> Asked: ...

    def answered(self, events: Sequence[Mapping[str, Any]], *, streamed: bool) -> Answered:
        """`events` is the one message when it was not streamed."""
        ...


def as_text(value: object) -> str:
    """A string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def other(value: object) -> Part:
    return Part(kind="other", data=value if isinstance(value, dict) else {"value": value})  # pyright: ignore[reportUnknownArgumentType]


def without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
