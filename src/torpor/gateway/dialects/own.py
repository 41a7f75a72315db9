"""Torpor's own API below /torpor/v1/ and /mcp: answered here, so all that a dialect says of it is its name."""

from collections.abc import Iterable, Mapping
from typing import Any

from torpor.config import Family
from torpor.gateway.dialects.base import AnswerFacts, Route


class Own:
    """The sandbox's own API; see `gateway.agent_api`."""

    name = "torpor"
    family: Family | None = None
    last_event: bytes | None = None
    opaque = False
    counts_if_asked = False

    def route(self, method: str, path: str, query: str) -> Route | None:  # noqa: ARG002
        if path == "/mcp" or path == "/torpor" or path.startswith("/torpor/"):
            return Route(path=path, is_llm=False)
        return None

    def read_event(self, event: Mapping[str, Any], facts: AnswerFacts) -> None:
        """No answer of ours is a stream."""

    def read_message(self, message: Mapping[str, Any], facts: AnswerFacts) -> None:  # noqa: ARG002
        facts.terminal = True

    def to_message(self, events: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, Any]]:
        raise ValueError(f"there is one shape of an answer, not {events!r}")

    def to_events(self, message: Mapping[str, Any]) -> bytes:
        raise ValueError(f"there is one shape of an answer, not events of {message!r}")

    def error(self, *, status: int, code: str, message: str) -> dict[str, Any]:  # noqa: ARG002
        return {"code": code, "message": message, "hint": ""}
