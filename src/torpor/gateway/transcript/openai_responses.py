"""OpenAI Responses."""

from collections.abc import Mapping, Sequence
from typing import Any

from torpor.gateway.dialects.base import items, mapping
from torpor.gateway.transcript.model import Answered, Asked, Message, Part, as_text, other, without

_CALLS = {"function_call", "custom_tool_call", "mcp_call"}


def asked(fields: Mapping[str, Any]) -> Asked:
    said = fields.get("input") or ()
    entries: list[Any] = [{"role": "user", "content": said}] if isinstance(said, str) else items(said)
    instructions = fields.get("instructions")
    return Asked(
        system=(Part(kind="text", text=as_text(instructions)),) if instructions else (),
        tools=tuple(
            (str(mapping(tool).get("name") or mapping(tool).get("type")), mapping(tool))
            for tool in items(fields.get("tools"))
        ),
        messages=tuple(_message(mapping(entry)) for entry in entries),
        settings=without(fields, "input", "instructions", "tools"),
    )


def answered(events: Sequence[Mapping[str, Any]], *, streamed: bool) -> Answered:
    response = _assembled(events) if streamed else events[0]
    parts = tuple(part for entry in items(response.get("output")) for part in _message(mapping(entry)).parts)
    reason = mapping(response.get("incomplete_details")).get("reason")
    return Answered(
        message=Message(role="assistant", parts=parts),
        model=response.get("model"),
        response_id=response.get("id"),
        finish_reason=reason or response.get("status"),
        usage=mapping(response.get("usage")),
    )


def _assembled(events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The response of the last event that has one, with the output items that were done if it was cut off."""
    response: dict[str, Any] = {}
    done: list[Any] = []
    for event in events:
        if isinstance(event.get("response"), dict):
            response = dict(event["response"])
        elif event.get("type") == "response.output_item.done":
            done.append(event.get("item"))
    return response if response.get("output") else {**response, "output": done}


def _message(entry: Mapping[str, Any]) -> Message:
    kind = entry.get("type", "message")
    if kind in _CALLS:
        text = as_text(entry.get("arguments", entry.get("input", "")))
        call = Part(kind="tool_call", text=text, tool_id=entry.get("call_id"), name=entry.get("name"))
        return Message(role="assistant", parts=(call,))
    if isinstance(kind, str) and kind.endswith("_call_output"):
        text = "\n".join(part.text for part in _contents(entry.get("output")))
        return Message(role="tool", parts=(Part(kind="tool_result", text=text, tool_id=entry.get("call_id")),))
    if kind == "reasoning":
        said = [as_text(mapping(part).get("text", "")) for part in items(entry.get("summary"))]
        thought = Part(kind="thinking", text="\n".join(said)) if said else other(entry)
        return Message(role="assistant", parts=(thought,))
    if kind == "message":
        return Message(role=str(entry["role"]), parts=tuple(_contents(entry.get("content"))))
    return Message(role="assistant", parts=(other(entry),))


def _contents(content: object) -> list[Part]:
    if isinstance(content, str):
        return [Part(kind="text", text=content)]
    blocks = [mapping(block) for block in items(content)]
    return [_content(block) for block in blocks]


def _content(block: Mapping[str, Any]) -> Part:
    text = block.get("text", block.get("refusal"))
    return other(block) if text is None else Part(kind="text", text=as_text(text))
