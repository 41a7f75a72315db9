"""Anything else that a configured upstream serves: nothing is known of it, so nothing is read, and bytes pass.

Which requests there are is configured (`paths` and `llm_paths` of an upstream); see `gateway.routing`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torpor.config import Family
from torpor.gateway.dialects.base import AnswerFacts, Route


class Raw:
    """HTTP of an unknown API."""

    name = "raw"
    family: Family | None = None
    last_event: bytes | None = None
    opaque = True
    counts_if_asked = False

    def route(self, method: str, path: str, query: str) -> Route | None:  # noqa: ARG002
        return None

    def read_event(self, event: Mapping[str, Any], facts: AnswerFacts) -> None: ...

    def read_message(self, message: Mapping[str, Any], facts: AnswerFacts) -> None: ...

    def to_message(self, events: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, Any]]:  # noqa: ARG002
        raise ValueError("the shapes of an unknown API are unknown")

    def to_events(self, message: Mapping[str, Any]) -> bytes:  # noqa: ARG002
        raise ValueError("the shapes of an unknown API are unknown")

    def error(self, *, status: int, code: str, message: str) -> dict[str, Any]:  # noqa: ARG002
        return {"error": {"message": message, "type": "torpor_error", "code": code}}
