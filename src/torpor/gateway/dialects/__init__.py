"""The providers' HTTP APIs: which dialect a request is in."""

from collections.abc import Iterable

from torpor.gateway.dialects.anthropic import Anthropic
from torpor.gateway.dialects.base import Dialect, Route
from torpor.gateway.dialects.openai_chat import OpenAIChat
from torpor.gateway.dialects.own import Own

OPENAI_CHAT = OpenAIChat()
ANTHROPIC = Anthropic()
OWN = Own()
_DIALECTS: tuple[Dialect, ...] = (OPENAI_CHAT, ANTHROPIC)


def find_route(method: str, path: str, header_names: Iterable[str]) -> tuple[Dialect, Route] | None:
    """The dialect of a request and where it goes. Anthropic's header decides for paths that both have."""
    speaks_anthropic = "anthropic-version" in header_names
    candidates = (ANTHROPIC, OPENAI_CHAT) if speaks_anthropic else _DIALECTS
    for dialect in candidates:
        route = dialect.route(method, path)
        if route is not None:
            return dialect, route
    return None


def dialect_named(name: str) -> Dialect:
    """The dialect that a logged call names.

    Raises:
        StopIteration: there is none of that name.
    """
    return next(dialect for dialect in (OWN, *_DIALECTS) if dialect.name == name)


def likely_dialect(path: str, header_names: Iterable[str]) -> Dialect | None:
    """Whose error shape a client that asked for an unknown path understands."""
    names = set(header_names)
    if "anthropic-version" in names or path.startswith("/v1/messages"):
        return ANTHROPIC
    return OPENAI_CHAT if path.startswith("/v1/") else None
