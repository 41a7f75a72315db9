"""One Chat Completions answer in its two shapes: a completion, and the chunks that it is streamed in."""

from collections.abc import Iterable, Mapping
from typing import Any

from torpor.gateway.dialects.base import mapping
from torpor.gateway.dialects.sse import event_bytes

_PER_CHUNK = frozenset({"choices", "object", "obfuscation", "usage"})


def to_message(chunks: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, Any]]:
    """The status and the completion that a client without streaming would have got."""
    completion: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        if chunk.get("error"):
            return 500, dict(chunk)
        completion |= {key: value for key, value in chunk.items() if key not in _PER_CHUNK}
        if chunk.get("usage"):
            completion["usage"] = chunk["usage"]
        for part in chunk.get("choices") or ():
            _add_choice(choices, mapping(part))
    completion["object"] = "chat.completion"
    completion["choices"] = [choices[index] for index in sorted(choices)]
    for choice in completion["choices"]:
        calls: dict[int, Any] | None = choice["message"].pop("tool_calls", None)
        if calls:
            choice["message"]["tool_calls"] = [calls[index] for index in sorted(calls)]
    return 200, completion


def _add_choice(choices: dict[int, dict[str, Any]], part: Mapping[str, Any]) -> None:
    index = part.get("index", 0)
    fresh: dict[str, Any] = {
        "index": index,
        "message": {"role": "assistant", "content": None, "refusal": None},
        "logprobs": None,
        "finish_reason": None,
    }
    choice = choices.setdefault(index, fresh)
    message: dict[str, Any] = choice["message"]
    for key, value in mapping(part.get("delta")).items():
        if key == "tool_calls":
            _add_tool_calls(message.setdefault("tool_calls", {}), value or ())
        elif key == "role":
            message["role"] = value or message["role"]
        elif isinstance(value, str):
            message[key] = (message.get(key) or "") + value
        elif value is not None:
            message[key] = value
    for key, value in mapping(part.get("logprobs")).items():
        logprobs: dict[str, Any] = choice["logprobs"] or {}
        choice["logprobs"] = {**logprobs, key: [*(logprobs.get(key) or ()), *(value or ())]}
    choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]


def _add_tool_calls(calls: dict[int, dict[str, Any]], parts: Iterable[Mapping[str, Any]]) -> None:
    for part in parts:
        call = calls.setdefault(part.get("index", 0), {"function": {"name": "", "arguments": ""}})
        call |= {key: value for key, value in part.items() if key not in {"index", "function"} and value is not None}
        for key, value in mapping(part.get("function")).items():
            call["function"][key] = call["function"].get(key, "") + (value or "")


def to_events(completion: Mapping[str, Any]) -> bytes:
    """The chunks that a streaming client would have got, each message in one delta."""
    shared = {key: value for key, value in completion.items() if key not in _PER_CHUNK}
    shared["object"] = "chat.completion.chunk"
    written: list[bytes] = []
    for choice in completion.get("choices") or ():
        delta = dict(mapping(choice.get("message")))
        if delta.get("tool_calls"):
            delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(delta["tool_calls"])]
        piece: dict[str, Any] = {"index": choice.get("index", 0), "delta": delta, "finish_reason": None}
        if choice.get("logprobs"):
            piece["logprobs"] = choice["logprobs"]
        end: dict[str, Any] = {
            "index": choice.get("index", 0),
            "delta": {},
            "finish_reason": choice.get("finish_reason"),
        }
        written += [event_bytes({**shared, "choices": [part]}) for part in (piece, end)]
    if completion.get("usage"):
        written.append(event_bytes({**shared, "choices": [], "usage": completion["usage"]}))
    return b"".join(written) + b"data: [DONE]\n\n"
