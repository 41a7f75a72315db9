"""OpenAI Responses: asking a model, and what can be done later with an answer that the provider keeps.

Asking (`POST /v1/responses`, and `/compact`, where a model thinks as well) is an LLM call. To read, cancel or delete a
kept answer are calls of the log like any other, but no model thinks for them, and a usage that they repeat is no second
bill. In background mode the first answer is only a receipt: each later look at it is a call of its own.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torpor.config import Family
from torpor.gateway.dialects import openai_responses_shapes
from torpor.gateway.dialects.base import AnswerFacts, Route, count, is_plain_segment, mapping
from torpor.gateway.dialects.openai_chat import openai_error

_ROOT = "/v1/responses"
_TERMINAL = {"response.completed", "response.failed", "response.incomplete", "response.cancelled"}
_OF_ONE = {("GET", ""), ("DELETE", ""), ("POST", "cancel"), ("GET", "input_items")}
"""What can be asked of one response, by method and last segment."""


class OpenAIResponses:
    """/v1/responses and what lies below it."""

    name = "openai_responses"
    family: Family | None = "openai"
    last_event: bytes | None = b"[DONE]"
    opaque = False
    counts_if_asked = False

    def route(self, method: str, path: str, query: str) -> Route | None:  # noqa: ARG002
        if method == "POST" and path in {_ROOT, f"{_ROOT}/compact"}:
            return Route(path=path, is_llm=True)
        if method == "POST" and path == f"{_ROOT}/input_tokens":
            return Route(path=path, is_llm=False)
        response_id, _, part = path.removeprefix(f"{_ROOT}/").partition("/")
        if path.startswith(f"{_ROOT}/") and is_plain_segment(response_id) and (method, part) in _OF_ONE:
            return Route(path=path, is_llm=False)
        return None

    def read_event(self, event: Mapping[str, Any], facts: AnswerFacts) -> None:
        kind = event.get("type")
        if kind == "error":
            facts.terminal = facts.error = True
        elif kind in _TERMINAL:
            facts.terminal = True
            self._read(mapping(event.get("response")), facts)
        elif kind == "response.created":
            self._read(mapping(event.get("response")), facts)

    def read_message(self, message: Mapping[str, Any], facts: AnswerFacts) -> None:
        facts.terminal = True
        self._read(message, facts)

    def _read(self, response: Mapping[str, Any], facts: AnswerFacts) -> None:
        facts.error = bool(response.get("error")) or response.get("status") == "failed"
        reason = mapping(response.get("incomplete_details")).get("reason") or response.get("status")
        if isinstance(reason, str):
            facts.finish_reason = reason
        response_id = response.get("id")
        if isinstance(response_id, str):
            facts.response_id = response_id
        usage = mapping(response.get("usage"))
        count(usage, "input_tokens", facts.usage, "input_tokens")
        count(usage, "output_tokens", facts.usage, "output_tokens")
        read, thought = mapping(usage.get("input_tokens_details")), mapping(usage.get("output_tokens_details"))
        count(read, "cached_tokens", facts.usage, "cache_read_input_tokens")
        count(read, "cache_write_tokens", facts.usage, "cache_creation_input_tokens")
        count(thought, "reasoning_tokens", facts.usage, "reasoning_output_tokens")

    def to_message(self, events: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, Any]]:
        return openai_responses_shapes.to_message(events)

    def to_events(self, message: Mapping[str, Any]) -> bytes:
        return openai_responses_shapes.to_events(message)

    def error(self, *, status: int, code: str, message: str) -> dict[str, Any]:
        return openai_error(status=status, code=code, message=message)
