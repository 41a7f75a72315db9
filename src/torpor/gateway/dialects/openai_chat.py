"""OpenAI Chat Completions, as spoken by OpenAI and by most other servers."""

from collections.abc import Iterable, Mapping
from typing import Any

from torpor.config import Family
from torpor.gateway.dialects import openai_chat_shapes
from torpor.gateway.dialects.base import AnswerFacts, Route, count, items, mapping, model_named


class OpenAIChat:
    """POST /v1/chat/completions, and the list of models."""

    name = "openai_chat"
    family: Family | None = "openai"
    last_event: bytes | None = b"[DONE]"
    opaque = False
    counts_if_asked = True

    def route(self, method: str, path: str, query: str) -> Route | None:  # noqa: ARG002
        if (method, path) == ("POST", "/v1/chat/completions"):
            return Route(path=path, is_llm=True)
        model = model_named(path, segments_max=2)
        if method == "GET" and (path == "/v1/models" or model):
            return Route(path=path, is_llm=False, model=model)
        return None

    def read_event(self, event: Mapping[str, Any], facts: AnswerFacts) -> None:
        if event.get("error"):
            facts.terminal = facts.error = True
        self._read(event, facts)
        # Servers exist that never say [DONE]; after its finish reason an answer lacks no word.
        facts.terminal = facts.terminal or facts.finish_reason is not None

    def read_message(self, message: Mapping[str, Any], facts: AnswerFacts) -> None:
        facts.terminal = True
        facts.error = bool(message.get("error"))
        self._read(message, facts)

    def _read(self, message: Mapping[str, Any], facts: AnswerFacts) -> None:
        for choice in items(message.get("choices")):
            reason = mapping(choice).get("finish_reason")
            if isinstance(reason, str):
                facts.finish_reason = reason
        usage = mapping(message.get("usage"))
        count(usage, "prompt_tokens", facts.usage, "input_tokens")
        count(usage, "completion_tokens", facts.usage, "output_tokens")
        prompt, completion = (
            mapping(usage.get("prompt_tokens_details")),
            mapping(usage.get("completion_tokens_details")),
        )
        count(prompt, "cached_tokens", facts.usage, "cache_read_input_tokens")
        count(completion, "reasoning_tokens", facts.usage, "reasoning_output_tokens")

    def to_message(self, events: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, Any]]:
        return openai_chat_shapes.to_message(events)

    def to_events(self, message: Mapping[str, Any]) -> bytes:
        return openai_chat_shapes.to_events(message)

    def error(self, *, status: int, code: str, message: str) -> dict[str, Any]:
        return openai_error(status=status, code=code, message=message)


def openai_error(*, status: int, code: str, message: str) -> dict[str, Any]:
    """An error in the shape of all of OpenAI's APIs."""
    kind = "authentication_error" if status == 401 else "invalid_request_error" if status < 500 else "api_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
