"""The providers' HTTP APIs: which dialect a request is in."""

from collections.abc import Iterable, Sequence

from torpor.gateway.dialects.anthropic import Anthropic
from torpor.gateway.dialects.base import Dialect, Route
from torpor.gateway.dialects.gemini import Gemini
from torpor.gateway.dialects.openai_chat import OpenAIChat
from torpor.gateway.dialects.openai_responses import OpenAIResponses
from torpor.gateway.dialects.own import Own
from torpor.gateway.dialects.raw import Raw

OPENAI_CHAT = OpenAIChat()
OPENAI_RESPONSES = OpenAIResponses()
ANTHROPIC = Anthropic()
GEMINI = Gemini()
RAW = Raw()
DIALECTS: tuple[Dialect, ...] = (OPENAI_CHAT, OPENAI_RESPONSES, ANTHROPIC, GEMINI, RAW)
OWN = Own()
"""The sandbox's own API: no provider's, so no upstream has a part in it."""


def dialects_told(header_names: Iterable[str]) -> tuple[Dialect, ...]:
    """The dialect that a request's headers tell, which decides about paths that several have (GET /v1/models)."""
    names = set(header_names)
    told = ((ANTHROPIC, "anthropic-version"), (GEMINI, "x-goog-api-key"), (GEMINI, "x-goog-api-client"))
    return tuple(dialect for dialect, name in told if name in names)


def find_route(method: str, path: str, query: str, first: Sequence[Dialect]) -> tuple[Dialect, Route] | None:
    """The dialect of a request, `first` before all others, and where it goes."""
    for dialect in (*first, *DIALECTS):
        route = dialect.route(method, path, query)
        if route is not None:
            return dialect, route
    return None


def dialect_named(name: str) -> Dialect:
    """The dialect that a logged call names.

    Raises:
        StopIteration: there is none of that name.
    """
    return next(dialect for dialect in (OWN, *DIALECTS) if dialect.name == name)


def likely_dialect(path: str, header_names: Iterable[str]) -> Dialect:
    """Whose error shape a client that asked for an unknown path understands."""
    for dialect in dialects_told(header_names):
        return dialect
    if path.startswith("/v1/messages"):
        return ANTHROPIC
    if path.startswith(("/v1beta/", "/v1alpha/")):
        return GEMINI
    return OPENAI_CHAT if path.startswith("/v1/") else RAW
