"""One Anthropic answer in its two shapes: a message, and the events that it is streamed in."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from torpor.gateway.dialects.base import mapping
from torpor.gateway.dialects.sse import event_bytes

_TEXTS = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}
"""The field that each kind of delta adds to."""


def to_message(events: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, Any]]:
    """The status and the message that a client without streaming would have got."""
    message: dict[str, Any] = {}
    blocks: dict[int, dict[str, Any]] = {}
    inputs: dict[int, str] = {}
    for event in events:
        match event.get("type"):
            case "error":
                overloaded = mapping(event.get("error")).get("type") == "overloaded_error"
                return (529 if overloaded else 500), dict(event)
            case "message_start":
                message = dict(mapping(event.get("message")))
            case "content_block_start":
                blocks[event["index"]] = dict(mapping(event.get("content_block")))
            case "content_block_delta":
                _add_delta(blocks[event["index"]], inputs, event["index"], mapping(event.get("delta")))
            case "message_delta":
                message |= mapping(event.get("delta"))
                message["usage"] = {**mapping(message.get("usage")), **mapping(event.get("usage"))}
            case _:
                pass
    for index, text in inputs.items():
        blocks[index]["input"] = json.loads(text or "{}")
    return 200, {**message, "content": [blocks[index] for index in sorted(blocks)]}


def _add_delta(block: dict[str, Any], inputs: dict[int, str], index: int, delta: Mapping[str, Any]) -> None:
    kind = delta.get("type", "")
    if kind in _TEXTS:
        field = _TEXTS[kind]
        block[field] = block.get(field, "") + delta.get(field, "")
    elif kind == "input_json_delta":
        inputs[index] = inputs.get(index, "") + delta.get("partial_json", "")
    elif kind == "citations_delta":
        block["citations"] = [*(block.get("citations") or ()), delta.get("citation")]


def to_events(message: Mapping[str, Any]) -> bytes:
    """The events that a streaming client would have got, each block in one delta."""
    last = {key: message.get(key) for key in ("stop_reason", "stop_sequence")}
    opening: dict[str, Any] = {**message, "content": [], "stop_reason": None, "stop_sequence": None}
    written = [_event({"type": "message_start", "message": opening})]
    for index, block in enumerate(message.get("content") or ()):
        empty, deltas = _opened(mapping(block))
        written.append(_event({"type": "content_block_start", "index": index, "content_block": empty}))
        written += [_event({"type": "content_block_delta", "index": index, "delta": delta}) for delta in deltas]
        written.append(_event({"type": "content_block_stop", "index": index}))
    written.append(_event({"type": "message_delta", "delta": last, "usage": message.get("usage")}))
    written.append(_event({"type": "message_stop"}))
    return b"".join(written)


def _opened(block: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A block as it starts, and what then completes it. A kind without deltas starts complete."""
    empty, deltas = dict(block), list[dict[str, Any]]()
    for kind, field in _TEXTS.items():
        if isinstance(block.get(field), str):
            empty[field] = ""
            deltas.append({"type": kind, field: block[field]})
    if "input" in block and str(block.get("type", "")).endswith("tool_use"):
        empty["input"] = {}
        deltas.append({"type": "input_json_delta", "partial_json": json.dumps(block["input"], ensure_ascii=False)})
    for citation in block.get("citations") or ():
        deltas.append({"type": "citations_delta", "citation": citation})
    return empty, deltas


def _event(event: Mapping[str, Any]) -> bytes:
    return event_bytes(event, name=event["type"])
