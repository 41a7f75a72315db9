"""Gemini generateContent and streamGenerateContent."""

from collections.abc import Mapping, Sequence
from typing import Any

from torpor.gateway.dialects.base import items, mapping
from torpor.gateway.transcript.model import Answered, Asked, Message, Part, as_text, other, without


def asked(fields: Mapping[str, Any]) -> Asked:
    system = mapping(fields.get("systemInstruction") or fields.get("system_instruction"))
    declared = [
        mapping(function)
        for tool in items(fields.get("tools"))
        for function in items(mapping(tool).get("functionDeclarations"))
    ]
    return Asked(
        system=_parts(system),
        tools=tuple((str(function.get("name")), function) for function in declared),
        messages=tuple(
            Message(role=str(mapping(content).get("role", "user")), parts=_parts(mapping(content)))
            for content in fields["contents"]
        ),
        settings=without(fields, "systemInstruction", "system_instruction", "tools", "contents"),
    )


def answered(events: Sequence[Mapping[str, Any]], *, streamed: bool) -> Answered:  # noqa: ARG001
    """Streamed or not, events have one shape; the texts that follow each other are one."""
    parts: list[Part] = []
    finish_reason: str | None = None
    usage: Mapping[str, Any] = {}
    for event in events:
        usage = mapping(event.get("usageMetadata")) or usage
        for candidate in map(mapping, items(event.get("candidates"))):
            finish_reason = candidate.get("finishReason") or finish_reason
            for part in _parts(mapping(candidate.get("content"))):
                if parts and part.kind == parts[-1].kind and part.kind in {"text", "thinking"}:
                    parts[-1] = Part(kind=part.kind, text=parts[-1].text + part.text)
                else:
                    parts.append(part)
    last = events[-1]
    return Answered(
        message=Message(role="model", parts=tuple(parts)),
        model=last.get("modelVersion"),
        response_id=last.get("responseId"),
        finish_reason=finish_reason,
        usage=usage,
    )


def _parts(content: Mapping[str, Any]) -> tuple[Part, ...]:
    return tuple(_part(mapping(part)) for part in items(content.get("parts")))


def _part(part: Mapping[str, Any]) -> Part:
    if "functionCall" in part:
        call = mapping(part["functionCall"])
        # Without ids a result belongs to the call of its name.
        tool_id = call.get("id") or call.get("name")
        return Part(kind="tool_call", text=as_text(call.get("args", {})), tool_id=tool_id, name=call.get("name"))
    if "functionResponse" in part:
        result = mapping(part["functionResponse"])
        response = mapping(result.get("response"))
        tool_id = result.get("id") or result.get("name")
        return Part(kind="tool_result", text=as_text(dict(response)), tool_id=tool_id, is_error="error" in response)
    if isinstance(part.get("text"), str):
        return Part(kind="thinking" if part.get("thought") else "text", text=part["text"])
    return other(part)
