"""OpenAI Responses as the scripted model speaks it, and the answers that it keeps to be asked for again."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from torpor.testing.model_scripts import Answer, Conversation, Say, UseTool
from torpor.testing.model_wire import OpenAIChat, Stamp, as_json, blocks_of, output_tokens, pieces, text_of


class OpenAIResponses:
    """POST /v1/responses."""

    content_type = "text/event-stream; charset=utf-8"

    def conversation(self, body: Mapping[str, Any], credential: str) -> Conversation:
        said = body.get("input")
        items = [{"role": "user", "content": said}] if isinstance(said, str) else blocks_of(said)
        texts = [text_of(item.get("content")) for item in items if item.get("role") == "user"]
        results = [item for item in items if item.get("type") == "function_call_output"]
        return Conversation(
            model=body.get("model", ""),
            stream=bool(body.get("stream")),
            last_text=texts[-1] if texts else "",
            tool_results=tuple(text_of(item.get("output")) for item in results),
            tools=frozenset(str(tool.get("name")) for tool in body.get("tools") or ()),
            credential=credential,
        )

    def response(self, answer: Answer, stamp: Stamp) -> dict[str, Any]:
        tokens = output_tokens(answer)
        usage: dict[str, Any] = {
            "input_tokens": stamp.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": stamp.prompt_tokens + tokens,
        }
        head: dict[str, Any] = {
            "id": f"resp_{stamp.nonce}",
            "object": "response",
            "created_at": stamp.created,
            "status": "completed",
        }
        state: dict[str, Any] = {"background": False, "error": None, "incomplete_details": None, "instructions": None}
        settings: dict[str, Any] = {
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "metadata": {},
            "temperature": 1.0,
        }
        output = [self._item(index, part, stamp) for index, part in enumerate(answer.parts)]
        return {**head, **state, "model": stamp.model, "output": output, **settings, "top_p": 1.0, "usage": usage}

    def _item(self, index: int, part: Say | UseTool, stamp: Stamp) -> dict[str, Any]:
        if isinstance(part, Say):
            content: list[Any] = [{"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}]
            head: dict[str, Any] = {"id": f"msg_{stamp.nonce}_{index}", "type": "message", "status": "completed"}
            return {**head, "role": "assistant", "content": content}
        head: dict[str, Any] = {"id": f"fc_{stamp.nonce}_{index}", "type": "function_call", "status": "completed"}
        call_id = f"call_{stamp.nonce}_{index}"
        return {**head, "call_id": call_id, "name": part.name, "arguments": json.dumps(part.arguments)}

    def message(self, answer: Answer, stamp: Stamp) -> bytes:
        return as_json(self.response(answer, stamp))

    def events(self, answer: Answer, stamp: Stamp) -> list[bytes]:
        numbered = enumerate(self._events(self.response(answer, stamp), answer.pace.chunk_characters))
        return [self._event({**event, "sequence_number": number}) for number, event in numbered]

    def _events(self, response: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
        begun: dict[str, Any] = {**response, "status": "in_progress", "output": [], "usage": None}
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}
        for index, item in enumerate(response["output"]):
            place: dict[str, Any] = {"item_id": item["id"], "output_index": index}
            yield from self._message_events(place, item, size) if "content" in item else self._tool(place, item, size)
            yield {"type": "response.output_item.done", "output_index": index, "item": item}
        yield {"type": "response.completed", "response": response}

    def _message_events(self, place: dict[str, Any], item: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
        part = item["content"][0]
        empty: dict[str, Any] = {**item, "status": "in_progress", "content": []}
        place = {**place, "content_index": 0}
        yield {"type": "response.output_item.added", "output_index": place["output_index"], "item": empty}
        yield {"type": "response.content_part.added", **place, "part": {**part, "text": ""}}
        for piece in pieces(part["text"], size):
            noise: dict[str, Any] = {"logprobs": [], "obfuscation": "x" * (16 - len(piece) % 16)}
            yield {"type": "response.output_text.delta", **place, "delta": piece, **noise}
        yield {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []}
        yield {"type": "response.content_part.done", **place, "part": part}

    def _tool(self, place: dict[str, Any], item: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
        empty: dict[str, Any] = {**item, "status": "in_progress", "arguments": ""}
        yield {"type": "response.output_item.added", "output_index": place["output_index"], "item": empty}
        for piece in pieces(item["arguments"], size):
            yield {"type": "response.function_call_arguments.delta", **place, "delta": piece}
        done = {"arguments": item["arguments"], "name": item["name"]}
        yield {"type": "response.function_call_arguments.done", **place, **done}

    def _event(self, event: dict[str, Any]) -> bytes:
        return b"event: " + event["type"].encode() + b"\ndata: " + as_json(event) + b"\n\n"

    def error(self, status: int, text: str) -> bytes:
        return OpenAIChat().error(status, text)

    def error_event(self, text: str) -> bytes:
        return self._event({"type": "error", "code": "server_error", "message": text, "param": None})


class Compaction(OpenAIResponses):
    """POST /v1/responses/compact: a model shortens a conversation."""

    def message(self, answer: Answer, stamp: Stamp) -> bytes:
        response = self.response(answer, stamp)
        output = [{"id": f"cmp_{stamp.nonce}", "type": "compaction", "encrypted_content": "c2VjcmV0"}]
        head: dict[str, Any] = {"id": response["id"], "object": "response.compaction", "created_at": stamp.created}
        return as_json({**head, "output": output, "usage": response["usage"]})


@dataclass(slots=True)
class _Kept:
    response: dict[str, Any]
    events: list[bytes]
    input: object
    looks: int = 0


@dataclass(slots=True)
class KeptResponses:
    """Answers by their id, as the provider keeps them.

    One of background mode is a receipt at first (`queued`), still at work when it is first looked at, and then done.
    """

    kept: dict[str, _Kept] = field(default_factory=dict[str, _Kept])

    def keep(self, body: Mapping[str, Any], answer: Answer, stamp: Stamp) -> dict[str, Any] | None:
        """Keep an answer; gives the receipt if it is one of background mode that is not streamed."""
        wire = OpenAIResponses()
        background = bool(body.get("background"))
        response: dict[str, Any] = {**wire.response(answer, stamp), "background": background}
        waits = background and not body.get("stream")
        self.kept[response["id"]] = _Kept(
            response, wire.events(answer, stamp), body.get("input"), looks=0 if waits else 1
        )
        return {**response, "status": "queued", "output": [], "usage": None} if waits else None

    def ask(self, method: str, path: str, query: str) -> list[bytes] | dict[str, Any] | None:
        """What a request below /v1/responses/ID gets: events, JSON, or None if there is no such answer."""
        response_id, _, part = path.removeprefix("/v1/responses/").partition("/")
        kept = self.kept.get(response_id)
        if kept is None:
            return None
        fields = parse_qs(query)
        match method, part:
            case "GET", "" if fields.get("stream") == ["true"]:
                return kept.events[int(fields.get("starting_after", ["-1"])[0]) + 1 :]
            case "GET", "":
                kept.looks += 1
                working: dict[str, Any] = {**kept.response, "status": "in_progress", "output": [], "usage": None}
                return working if kept.looks == 1 else kept.response
            case "GET", "input_items":
                return {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
            case "POST", "cancel":
                kept.response = {**kept.response, "status": "cancelled"}
                return kept.response
            case "DELETE", "":
                del self.kept[response_id]
                return {"id": response_id, "object": "response", "deleted": True}
            case _:
                return None
