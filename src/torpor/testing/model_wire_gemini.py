"""Gemini as the scripted model speaks it: whole, as server-sent events, and as one array of JSON."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from torpor.testing.model_scripts import Answer, Conversation, Say
from torpor.testing.model_wire import Stamp, as_json, blocks_of, output_tokens, pieces, text_of

_PATH = re.compile(r"/(?:v1|v1beta)/models/([^/:]+):(generateContent|streamGenerateContent)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemini:
    """POST /v1/models/MODEL:generateContent or :streamGenerateContent; the path says what the body does not."""

    model: str
    streams: bool
    as_array: bool = False

    @property
    def content_type(self) -> str:
        return "application/json; charset=UTF-8" if self.as_array else "text/event-stream"

    def conversation(self, body: Mapping[str, Any], credential: str) -> Conversation:
        texts: list[str] = []
        results: list[str] = []
        for content in body.get("contents") or ():
            parts = blocks_of(content.get("parts"))
            results += [str(part["functionResponse"].get("response")) for part in parts if "functionResponse" in part]
            if content.get("role", "user") == "user":
                texts.append(text_of(parts))
        declared = [blocks_of(tool.get("functionDeclarations")) for tool in body.get("tools") or ()]
        return Conversation(
            model=self.model,
            stream=self.streams,
            last_text=texts[-1] if texts else "",
            tool_results=tuple(results),
            tools=frozenset(str(function.get("name")) for functions in declared for function in functions),
            credential=credential,
        )

    def _answer(self, stamp: Stamp, parts: list[dict[str, Any]], *, output: int, finish: str | None) -> dict[str, Any]:
        candidate: dict[str, Any] = {"content": {"parts": parts, "role": "model"}, "index": 0}
        if finish:
            candidate["finishReason"] = finish
        usage = {
            "promptTokenCount": stamp.prompt_tokens,
            "candidatesTokenCount": output,
            "totalTokenCount": stamp.prompt_tokens + output,
        }
        head = {"modelVersion": stamp.model, "responseId": stamp.nonce}
        return {"candidates": [candidate], "usageMetadata": usage, **head}

    def _parts(self, answer: Answer, size: int) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for part in answer.parts:
            if isinstance(part, Say):
                parts += [{"text": piece} for piece in pieces(part.text, size or len(part.text))]
            else:
                parts.append({"functionCall": {"name": part.name, "args": dict(part.arguments)}})
        return parts

    def message(self, answer: Answer, stamp: Stamp) -> bytes:
        return as_json(self._answer(stamp, self._parts(answer, 0), output=output_tokens(answer), finish="STOP"))

    def events(self, answer: Answer, stamp: Stamp) -> list[bytes]:
        parts = self._parts(answer, answer.pace.chunk_characters)
        said = [
            as_json(self._answer(stamp, [part], output=number, finish=None)) for number, part in enumerate(parts[:-1])
        ]
        said.append(as_json(self._answer(stamp, parts[-1:], output=output_tokens(answer), finish="STOP")))
        if not self.as_array:
            return [b"data: " + event + b"\r\n\r\n" for event in said]
        return [(b",\r\n" if number else b"[") + event for number, event in enumerate(said)] + [b"]"]

    def error(self, status: int, text: str) -> bytes:
        kinds = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED"}
        return as_json({"error": {"code": status, "message": text, "status": kinds.get(status, "INTERNAL")}})

    def error_event(self, text: str) -> bytes:
        error = self.error(503, text)
        return b",\r\n" + error + b"]" if self.as_array else b"data: " + error + b"\r\n\r\n"


def gemini_wire(path: str, query: str) -> Gemini | None:
    """The wire of a request's address, if it is one of Gemini's."""
    found = _PATH.fullmatch(path)
    if found is None:
        return None
    streams = found[2] == "streamGenerateContent"
    return Gemini(model=found[1], streams=streams, as_array=streams and parse_qs(query).get("alt") != ["sse"])
