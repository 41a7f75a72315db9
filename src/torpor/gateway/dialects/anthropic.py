"""Anthropic Messages."""

from collections.abc import Iterable, Mapping
from typing import Any

from torpor.config import Family
from torpor.gateway.dialects import anthropic_shapes
from torpor.gateway.dialects.base import AnswerFacts, Route, count, mapping, model_named

_ERROR_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    504: "timeout_error",
}
_PROMPT_PARTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


class Anthropic:
    """POST /v1/messages, its token count, and the list of models."""

    name = "anthropic"
    family: Family | None = "anthropic"
    last_event: bytes | None = None
    opaque = False
    counts_if_asked = False

    def route(self, method: str, path: str, query: str) -> Route | None:  # noqa: ARG002
        if (method, path) == ("POST", "/v1/messages"):
            return Route(path=path, is_llm=True)
        if (method, path) == ("POST", "/v1/messages/count_tokens"):
            return Route(path=path, is_llm=False)
        model = model_named(path, segments_max=1)
        if method == "GET" and (path == "/v1/models" or model):
            return Route(path=path, is_llm=False, model=model)
        return None

    def read_event(self, event: Mapping[str, Any], facts: AnswerFacts) -> None:
        match event.get("type"):
            case "message_stop":
                facts.terminal = True
            case "error":
                facts.terminal = facts.error = True
            case "message_start":
                self._read_usage(mapping(event.get("message")).get("usage"), facts)
            case "message_delta":
                self._read_reason(mapping(event.get("delta")), facts)
                self._read_usage(event.get("usage"), facts)
            case _:
                pass

    def read_message(self, message: Mapping[str, Any], facts: AnswerFacts) -> None:
        facts.terminal = True
        facts.error = message.get("type") == "error"
        self._read_reason(message, facts)
        self._read_usage(message.get("usage"), facts)
        count(message, "input_tokens", facts.usage, "input_tokens")

    def _read_reason(self, source: Mapping[str, Any], facts: AnswerFacts) -> None:
        reason = source.get("stop_reason")
        if isinstance(reason, str):
            facts.finish_reason = reason

    def _read_usage(self, source: object, facts: AnswerFacts) -> None:
        """Usage is cumulative: the last value counts. The parts of the prompt are disjoint and add up to it."""
        usage = mapping(source)
        count(usage, "output_tokens", facts.usage, "output_tokens")
        for name in _PROMPT_PARTS[1:]:
            count(usage, name, facts.usage, name)
        written = mapping(usage.get("cache_creation"))
        count(written, "ephemeral_1h_input_tokens", facts.usage, "cache_creation_1h_input_tokens")
        parts: dict[str, int] = {}
        for name in _PROMPT_PARTS:
            count(usage, name, parts, name)
        if "input_tokens" in parts:
            facts.usage["input_tokens"] = sum(parts.values())

    def to_message(self, events: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, Any]]:
        return anthropic_shapes.to_message(events)

    def to_events(self, message: Mapping[str, Any]) -> bytes:
        return anthropic_shapes.to_events(message)

    def error(self, *, status: int, code: str, message: str) -> dict[str, Any]:
        kind = _ERROR_KINDS.get(status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": message, "code": code}}
