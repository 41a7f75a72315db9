"""Google's Gemini: generateContent and its two streamed forms, the token count, and the list of models.

The path names the model and the shape of the answer; the body says neither. Clients may put their key into the query
(`?key=`), which counts as a credential like the headers do.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qs

from torpor.config import Family
from torpor.gateway.dialects import gemini_shapes
from torpor.gateway.dialects.base import AnswerFacts, Route, Shape, count, is_plain_segment, items, mapping

_ASKED = re.compile(r"/(?:v1|v1beta|v1alpha)/((?:models|tunedModels)/[^/:]+):(\w+)")
_LISTED = re.compile(r"/(?:v1|v1beta|v1alpha)/models(?:/([^/:]+))?")
_STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class Gemini:
    """/v1beta/models and what is asked of each; /v1 and /v1alpha have the same."""

    name = "gemini"
    family: Family | None = "gemini"
    last_event: bytes | None = None
    opaque = False
    counts_if_asked = False

    def route(self, method: str, path: str, query: str) -> Route | None:
        asked, listed = _ASKED.fullmatch(path), _LISTED.fullmatch(path)
        if method == "GET" and listed is not None and (listed[1] is None or is_plain_segment(listed[1])):
            return Route(path=path, is_llm=False, model=listed[1])
        if method != "POST" or asked is None or not is_plain_segment(asked[1].partition("/")[2]):
            return None
        model, verb = asked[1].removeprefix("models/"), asked[2]
        if verb == "countTokens":
            return Route(path=path, is_llm=False, model=model)
        if verb == "generateContent":
            return Route(path=path, is_llm=True, model=model, shape=Shape.MESSAGE)
        if verb == "streamGenerateContent":
            shape = Shape.EVENTS if parse_qs(query).get("alt") == ["sse"] else Shape.ARRAY
            return Route(path=path, is_llm=True, model=model, shape=shape)
        return None

    def read_event(self, event: Mapping[str, Any], facts: AnswerFacts) -> None:
        self._read(event, facts)
        facts.terminal = facts.terminal or facts.error or facts.finish_reason is not None

    def read_message(self, message: Mapping[str, Any], facts: AnswerFacts) -> None:
        facts.terminal = True
        self._read(message, facts)

    def _read(self, answer: Mapping[str, Any], facts: AnswerFacts) -> None:
        facts.error = facts.error or bool(answer.get("error"))
        reasons = [mapping(candidate).get("finishReason") for candidate in items(answer.get("candidates"))]
        for reason in (*reasons, mapping(answer.get("promptFeedback")).get("blockReason")):
            if isinstance(reason, str):
                facts.finish_reason = reason
        self._read_usage(mapping(answer.get("usageMetadata")), facts)

    def _read_usage(self, usage: Mapping[str, Any], facts: AnswerFacts) -> None:
        """Every event has the counts so far: the last value counts. What is thought is billed as output."""
        parts: dict[str, int] = {}
        for name in ("promptTokenCount", "toolUsePromptTokenCount", "candidatesTokenCount", "thoughtsTokenCount"):
            count(usage, name, parts, name)
        if "promptTokenCount" in parts:
            facts.usage["input_tokens"] = parts["promptTokenCount"] + parts.get("toolUsePromptTokenCount", 0)
        if parts.keys() & {"candidatesTokenCount", "thoughtsTokenCount"}:
            said, thought = parts.get("candidatesTokenCount", 0), parts.get("thoughtsTokenCount", 0)
            facts.usage["output_tokens"] = said + thought
        count(usage, "thoughtsTokenCount", facts.usage, "reasoning_output_tokens")
        count(usage, "cachedContentTokenCount", facts.usage, "cache_read_input_tokens")

    def to_message(self, events: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, Any]]:
        return gemini_shapes.to_message(events)

    def to_events(self, message: Mapping[str, Any]) -> bytes:
        return gemini_shapes.to_events(message)

    def error(self, *, status: int, code: str, message: str) -> dict[str, Any]:
        kind = _STATUSES.get(status, "INVALID_ARGUMENT" if status < 500 else "INTERNAL")
        detail = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": code, "domain": "torpor"}
        return {"error": {"code": status, "message": message, "status": kind, "details": [detail]}}
