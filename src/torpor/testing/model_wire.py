"""Wire formats that the scripted model speaks: OpenAI Chat Completions and Anthropic Messages, and what all share.

Each turns a request body into a `Conversation` and an `Answer` into the provider's real bytes: one JSON message, or the
provider's sequence of server-sent events, the last of which is its terminal one.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torpor.testing.model_scripts import Answer, Conversation, Say, UseTool


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What an answer carries besides the script's words."""

    nonce: str
    created: int
    model: str
    prompt_tokens: int
    include_usage: bool = False


class Wire(Protocol):
    @property
    def content_type(self) -> str:
        """Of a streamed answer."""
        ...

    def conversation(self, body: Mapping[str, Any], credential: str) -> Conversation: ...

    def message(self, answer: Answer, stamp: Stamp) -> bytes: ...

    def events(self, answer: Answer, stamp: Stamp) -> list[bytes]: ...

    def error(self, status: int, text: str) -> bytes: ...

    def error_event(self, text: str) -> bytes: ...


def as_json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def pieces(text: str, size: int) -> Iterator[str]:
    for start in range(0, len(text), size):
        yield text[start : start + size]


def blocks_of(content: object) -> list[dict[str, Any]]:
    """The blocks of a message's content, which is a string or a list of them."""
    return cast("list[dict[str, Any]]", content) if isinstance(content, list) else []


def text_of(content: object) -> str:
    if isinstance(content, str):
        return content
    return "".join(str(block.get("text", "")) for block in blocks_of(content))


def output_tokens(answer: Answer) -> int:
    words = sum(len(part.text.split()) if isinstance(part, Say) else 8 for part in answer.parts)
    return max(1, words)


class OpenAIChat:
    """POST /v1/chat/completions."""

    content_type = "text/event-stream; charset=utf-8"

    def conversation(self, body: Mapping[str, Any], credential: str) -> Conversation:
        messages: list[dict[str, Any]] = body.get("messages", [])
        options: dict[str, Any] = body.get("stream_options") or {}
        texts = [text_of(message.get("content")) for message in messages if message.get("role") == "user"]
        return Conversation(
            model=body.get("model", ""),
            stream=bool(body.get("stream")),
            last_text=texts[-1] if texts else "",
            tool_results=tuple(text_of(message["content"]) for message in messages if message.get("role") == "tool"),
            tools=frozenset(tool["function"]["name"] for tool in body.get("tools") or () if "function" in tool),
            credential=credential,
            include_usage=bool(options.get("include_usage")),
        )

    def _usage(self, answer: Answer, stamp: Stamp) -> dict[str, Any]:
        output = output_tokens(answer)
        total = stamp.prompt_tokens + output
        return {"prompt_tokens": stamp.prompt_tokens, "completion_tokens": output, "total_tokens": total}

    def _tool_calls(self, answer: Answer, stamp: Stamp) -> list[dict[str, Any]]:
        tools = [part for part in answer.parts if isinstance(part, UseTool)]
        return [
            {
                "id": f"call_{stamp.nonce}_{index}",
                "type": "function",
                "function": {"name": tool.name, "arguments": json.dumps(tool.arguments)},
            }
            for index, tool in enumerate(tools)
        ]

    def message(self, answer: Answer, stamp: Stamp) -> bytes:
        calls = self._tool_calls(answer, stamp)
        text = "".join(part.text for part in answer.parts if isinstance(part, Say))
        message: dict[str, Any] = {"role": "assistant", "content": text or None, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        finish = "tool_calls" if calls else "stop"
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        head = {"id": f"chatcmpl-{stamp.nonce}", "object": "chat.completion", "created": stamp.created}
        return as_json({**head, "model": stamp.model, "choices": [choice], "usage": self._usage(answer, stamp)})

    def events(self, answer: Answer, stamp: Stamp) -> list[bytes]:
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        size = answer.pace.chunk_characters
        for part in answer.parts:
            if isinstance(part, Say):
                deltas += [{"content": piece} for piece in pieces(part.text, size)]
        calls = self._tool_calls(answer, stamp)
        for index, call in enumerate(calls):
            opening = {**call, "index": index, "function": {**call["function"], "arguments": ""}}
            deltas.append({"tool_calls": [opening]})
            deltas += [
                {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}
                for piece in pieces(call["function"]["arguments"], size)
            ]
        chunks = [self._chunk(stamp, [{"index": 0, "delta": delta, "finish_reason": None}]) for delta in deltas]
        finish = "tool_calls" if calls else "stop"
        chunks.append(self._chunk(stamp, [{"index": 0, "delta": {}, "finish_reason": finish}]))
        if stamp.include_usage:
            chunks = [{**chunk, "usage": None} for chunk in chunks]
            chunks.append({**self._chunk(stamp, []), "usage": self._usage(answer, stamp)})
        return [b"data: " + as_json(chunk) + b"\n\n" for chunk in chunks] + [b"data: [DONE]\n\n"]

    def _chunk(self, stamp: Stamp, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": f"chatcmpl-{stamp.nonce}", "object": "chat.completion.chunk", "created": stamp.created}
        return {**head, "model": stamp.model, "choices": choices}

    def error(self, status: int, text: str) -> bytes:
        kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
        return as_json({"error": {"message": text, "type": kind, "param": None, "code": None}})

    def error_event(self, text: str) -> bytes:
        return b"data: " + self.error(500, text) + b"\n\n"


class Anthropic:
    """POST /v1/messages."""

    content_type = "text/event-stream; charset=utf-8"

    def conversation(self, body: Mapping[str, Any], credential: str) -> Conversation:
        results: list[str] = []
        texts: list[str] = []
        for message in body.get("messages", []):
            content = message.get("content")
            answers = [block for block in blocks_of(content) if block.get("type") == "tool_result"]
            results += [text_of(block.get("content")) for block in answers]
            if message.get("role") == "user":
                texts.append(text_of(content))
        return Conversation(
            model=body.get("model", ""),
            stream=bool(body.get("stream")),
            last_text=texts[-1] if texts else "",
            tool_results=tuple(results),
            tools=frozenset(str(tool.get("name")) for tool in body.get("tools") or ()),
            credential=credential,
        )

    def _blocks(self, answer: Answer, stamp: Stamp) -> list[dict[str, Any]]:
        blocks: list[dict[str, Any]] = []
        for index, part in enumerate(answer.parts):
            if isinstance(part, Say):
                blocks.append({"type": "text", "text": part.text})
            else:
                tool_id = f"toolu_{stamp.nonce}_{index}"
                blocks.append({"type": "tool_use", "id": tool_id, "name": part.name, "input": dict(part.arguments)})
        return blocks

    def _message(self, stamp: Stamp) -> dict[str, Any]:
        usage = {
            "input_tokens": stamp.prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 1,
            "service_tier": "standard",
        }
        head: dict[str, Any] = {"id": f"msg_{stamp.nonce}", "type": "message", "role": "assistant"}
        return {
            **head,
            "model": stamp.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _stop_reason(self, answer: Answer) -> str:
        return "tool_use" if any(isinstance(part, UseTool) for part in answer.parts) else "end_turn"

    def message(self, answer: Answer, stamp: Stamp) -> bytes:
        message = self._message(stamp)
        message["usage"]["output_tokens"] = output_tokens(answer)
        return as_json({**message, "content": self._blocks(answer, stamp), "stop_reason": self._stop_reason(answer)})

    def events(self, answer: Answer, stamp: Stamp) -> list[bytes]:
        events: list[dict[str, Any]] = [{"type": "message_start", "message": self._message(stamp)}]
        for index, block in enumerate(self._blocks(answer, stamp)):
            events += self._block_events(index, block, answer.pace.chunk_characters)
            if index == 0:
                events.insert(2, {"type": "ping"})
        delta = {"stop_reason": self._stop_reason(answer), "stop_sequence": None}
        events.append({"type": "message_delta", "delta": delta, "usage": {"output_tokens": output_tokens(answer)}})
        events.append({"type": "message_stop"})
        return [self._event(event) for event in events]

    def _block_events(self, index: int, block: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
        if block["type"] == "text":
            empty: dict[str, Any] = {"type": "text", "text": ""}
            deltas = [{"type": "text_delta", "text": piece} for piece in pieces(block["text"], size)]
        else:
            empty = {**block, "input": {}}
            text = json.dumps(block["input"])
            deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces(text, size)]
        yield {"type": "content_block_start", "index": index, "content_block": empty}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}

    def _event(self, event: dict[str, Any]) -> bytes:
        return b"event: " + event["type"].encode() + b"\ndata: " + as_json(event) + b"\n\n"

    def error(self, status: int, text: str) -> bytes:
        kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
        kinds |= {429: "rate_limit_error", 529: "overloaded_error"}
        return as_json({"type": "error", "error": {"type": kinds.get(status, "api_error"), "message": text}})

    def error_event(self, text: str) -> bytes:
        return self._event({"type": "error", "error": {"type": "overloaded_error", "message": text}})
