"""Anthropic Messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from torpor.gateway.dialects import anthropic_shapes
from torpor.gateway.dialects.base import items, mapping
from torpor.gateway.transcript.model import Answered, Asked, Message, Part, as_text, other, without


def asked(fields: Mapping[str, Any]) -> Asked:
    return Asked(
        system=_parts(fields.get("system") or ()),
        tools=tuple((str(mapping(tool).get("name")), mapping(tool)) for tool in items(fields.get("tools"))),
        messages=tuple(
            Message(role=str(message["role"]), parts=_parts(message["content"])) for message in fields["messages"]
        ),
        settings=without(fields, "system", "tools", "messages"),
    )


def answered(events: Sequence[Mapping[str, Any]], *, streamed: bool) -> Answered:
    message = _assembled(events) if streamed else events[0]
    return Answered(
        message=Message(role=str(message.get("role", "assistant")), parts=_parts(message.get("content") or ())),
        model=message.get("model"),
        response_id=message.get("id"),
        finish_reason=message.get("stop_reason"),
        usage=mapping(message.get("usage")),
    )


def _assembled(events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The message as far as it came; the arguments of a tool call that was cut off are left as they are."""
    try:
        return anthropic_shapes.to_message(events)[1]
    except ValueError:
        deltas = [event for event in events if mapping(event.get("delta")).get("type") != "input_json_delta"]
        return anthropic_shapes.to_message(deltas)[1]


def _parts(content: object) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (Part(kind="text", text=content),)
    return tuple(_part(mapping(block)) for block in items(content))


def _part(block: Mapping[str, Any]) -> Part:
    kind = str(block.get("type", ""))
    match kind:
        case "text":
            return Part(kind="text", text=as_text(block["text"]))
        case "thinking":
            return Part(kind="thinking", text=as_text(block["thinking"]))
        case "tool_use" | "server_tool_use" | "mcp_tool_use":
            arguments = as_text(block.get("input", {}))
            return Part(kind="tool_call", text=arguments, tool_id=block.get("id"), name=block.get("name"))
        case _ if kind.endswith("tool_result"):
            return Part(
                kind="tool_result",
                text=_result_text(block.get("content")),
                tool_id=block.get("tool_use_id"),
                is_error=bool(block.get("is_error")),
            )
        case _:
            return other(block)


def _result_text(content: object) -> str:
    blocks = [mapping(block) for block in items(content)]
    if blocks:
        return "\n".join(as_text(block["text"]) if "text" in block else as_text(dict(block)) for block in blocks)
    return "" if content is None else as_text(content)
