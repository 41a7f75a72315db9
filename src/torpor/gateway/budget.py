"""How large a model call can become, read from a copy of its request: what a budget reserves before it is sent.

Whatever cannot be read counts as not said, so the worst is assumed. The agent is not trusted here either: a limit that
it states is one that its provider enforces.
"""

from dataclasses import dataclass

import msgspec

PROMPT_TOKENS_HIDDEN = 4096
"""What a provider adds to a prompt by itself (how tools are used, templates)."""
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


class _Generation(msgspec.Struct):
    maxOutputTokens: object = None  # noqa: N815 - Gemini's spelling
    candidateCount: object = None  # noqa: N815


class _Body(msgspec.Struct):
    max_tokens: object = None
    max_completion_tokens: object = None
    max_output_tokens: object = None
    n: object = None
    previous_response_id: object = None
    conversation: object = None
    cachedContent: object = None  # noqa: N815
    generationConfig: object = None  # noqa: N815


def size_of(body: bytes) -> RequestSize:
    """Measure a request by its decoded body."""
    said, generation = _decoded(body)
    named = (said.max_tokens, said.max_completion_tokens, said.max_output_tokens, generation.maxOutputTokens)
    tokens = [number for number in map(_count, named) if number is not None]
    answers = max(_count(said.n) or 1, _count(generation.candidateCount) or 1)
    return RequestSize(
        body_bytes=len(body),
        names_more=any(
            value is not None for value in (said.previous_response_id, said.conversation, said.cachedContent)
        ),
        limits=OutputLimits(tokens=max(tokens, default=None), answers=answers),
    )


def _decoded(body: bytes) -> tuple[_Body, _Generation]:
    try:
        said = msgspec.json.decode(body, type=_Body)
    except (msgspec.DecodeError, RecursionError):
        return _Body(), _Generation()
    try:
        return said, msgspec.convert(said.generationConfig, _Generation)
    except msgspec.ValidationError:
        return said, _Generation()


def _count(value: object) -> int | None:
    """A token count if it is one that a provider would take."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
