"""OpenAI Chat Completions."""

from collections.abc import Mapping, Sequence
from typing import Any

from torpor.gateway.dialects import openai_chat_shapes
from torpor.gateway.dialects.base import items, mapping
from torpor.gateway.transcript.model import Answered, Asked, Message, Part, as_text, other, without

_SYSTEM = {"system", "developer"}


def asked(fields: Mapping[str, Any]) -> Asked:
    messages = [mapping(message) for message in fields["messages"]]
    # The system prompt is what stands before the conversation; a later one is a message like others.
    first = next((at for at, message in enumerate(messages) if message.get("role") not in _SYSTEM), len(messages))
    return Asked(
        system=tuple(part for message in messages[:first] for part in _parts(message)),
        tools=tuple(_tool(mapping(tool)) for tool in items(fields.get("tools"))),
        messages=tuple(Message(role=str(message["role"]), parts=_parts(message)) for message in messages[first:]),
        settings=without(fields, "tools", "messages"),
    )


def answered(events: Sequence[Mapping[str, Any]], *, streamed: bool) -> Answered:
    message = openai_chat_shapes.to_message(events)[1] if streamed else events[0]
    choices = [mapping(choice) for choice in items(message.get("choices"))]
    parts = tuple(part for choice in choices for part in _parts(mapping(choice.get("message"))))
    return Answered(
        message=Message(role="assistant", parts=parts),
        model=message.get("model"),
        response_id=message.get("id"),
        finish_reason=choices[0].get("finish_reason") if choices else None,
        usage=mapping(message.get("usage")),
    )


def _tool(tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    return str(mapping(tool.get("function")).get("name") or tool.get("name")), tool


def _parts(message: Mapping[str, Any]) -> tuple[Part, ...]:
    content = message.get("content")
    if message.get("role") == "tool":
        text = content if isinstance(content, str) else "\n".join(part.text for part in _contents(content))
        return (Part(kind="tool_result", text=text, tool_id=message.get("tool_call_id")),)
    thought = message.get("reasoning_content") or message.get("reasoning")
    parts = [Part(kind="thinking", text=as_text(thought))] if thought else []
    parts += _contents(content)
    if message.get("refusal"):
        parts.append(Part(kind="text", text=as_text(message["refusal"])))
    for call in map(mapping, items(message.get("tool_calls"))):
        function = mapping(call.get("function") or call.get("custom"))
        text = as_text(function.get("arguments", function.get("input", "")))
        parts.append(Part(kind="tool_call", text=text, tool_id=call.get("id"), name=function.get("name")))
    return tuple(parts)


def _contents(content: object) -> list[Part]:
    if content is None or content == "":
        return []
    if isinstance(content, str):
        return [Part(kind="text", text=content)]
    blocks = [mapping(block) for block in items(content)]
    return [Part(kind="text", text=as_text(block["text"])) if "text" in block else other(block) for block in blocks]
