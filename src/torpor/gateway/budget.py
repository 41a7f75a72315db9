"""How large a model call can become, read from a copy of its request: what a budget reserves before it is sent.

Whatever cannot be read counts as not said, so the worst is assumed. The agent is not trusted here either: a limit that
it states is one that its provider enforces.
"""

from dataclasses import dataclass
from typing import TypeVar

import msgspec

PROMPT_TOKENS_HIDDEN = 4096
"""What a provider adds to a prompt by itself (how tools are used, templates)."""
COUNT_DIGITS_MAX = 18
WINDOW_TOKENS = 1_000_000
"""The input of a request that names more than it holds, to a model whose window is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputLimits:
    """What a request says of its answers: how many, and how long each may be (None: it says nothing)."""

    tokens: int | None
    answers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSize:
    """A request as far as its price goes.

    Attributes:
        body_bytes: of the body, decoded.
        names_more: the model reads more than the body: an earlier answer, a conversation, a cache at the provider.
    """

    body_bytes: int
    names_more: bool
    limits: OutputLimits

    def input_tokens(self, window: int | None) -> int:
        """The most tokens that the prompt can have: a token is a byte or more, and fits the window."""
        if self.names_more:
            return window or WINDOW_TOKENS
        most = self.body_bytes + PROMPT_TOKENS_HIDDEN
        return most if window is None else min(most, window)


_NULL = msgspec.Raw(b"null")
"""Values are left as bytes: few bytes of JSON can become many of objects, and a hostile agent knows that."""


_Kind = TypeVar("_Kind", bound=msgspec.Struct)


class _Generation(msgspec.Struct):
    maxOutputTokens: msgspec.Raw = _NULL  # noqa: N815 - Gemini's spelling
    candidateCount: msgspec.Raw = _NULL  # noqa: N815


class _Body(msgspec.Struct):
    max_tokens: msgspec.Raw = _NULL
    max_completion_tokens: msgspec.Raw = _NULL
    max_output_tokens: msgspec.Raw = _NULL
    n: msgspec.Raw = _NULL
    previous_response_id: msgspec.Raw = _NULL
    conversation: msgspec.Raw = _NULL
    cachedContent: msgspec.Raw = _NULL  # noqa: N815
    generationConfig: msgspec.Raw = _NULL  # noqa: N815


def size_of(body: bytes) -> RequestSize:
    """Measure a request by its decoded body."""
    said, generation = _decoded(body)
    named = (said.max_tokens, said.max_completion_tokens, said.max_output_tokens, generation.maxOutputTokens)
    tokens = [number for number in map(_count, named) if number is not None]
    answers = max(_count(said.n) or 1, _count(generation.candidateCount) or 1)
    return RequestSize(
        body_bytes=len(body),
        names_more=any(
            bytes(value) != b"null" for value in (said.previous_response_id, said.conversation, said.cachedContent)
        ),
        limits=OutputLimits(tokens=max(tokens, default=None), answers=answers),
    )


def _decoded(body: bytes) -> tuple[_Body, _Generation]:
    said = _members(body, _Body)
    return said, _members(said.generationConfig, _Generation)


def _members(raw: bytes | msgspec.Raw, kind: type[_Kind]) -> _Kind:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return kind()


def _count(raw: msgspec.Raw) -> int | None:
    """A token count if it is one that a provider would take."""
    digits = bytes(raw)
    return int(digits) if len(digits) <= COUNT_DIGITS_MAX and digits.isdigit() and int(digits) > 0 else None
