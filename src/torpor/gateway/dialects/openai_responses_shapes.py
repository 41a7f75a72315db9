"""One Responses answer in its two shapes: a response, and the events that it is streamed in.

The last event holds the whole response, so one way is short. The other way unfolds it: every item of the output is
opened empty, filled in one delta for each text that it has, and closed.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torpor.gateway.dialects.base import items, mapping
from torpor.gateway.dialects.sse import event_bytes

_ENDS = frozenset({"completed", "failed", "incomplete", "cancelled"})
"""Statuses that a response stays in; an event of each name ends a stream."""
_TEXT_PARTS = {
    "output_text": ("text", "response.output_text"),
    "refusal": ("refusal", "response.refusal"),
    "reasoning_text": ("text", "response.reasoning_text"),
}
"""By the type of a content part: the field with its text, and the stem of its events."""
_ARGUMENTS = {
    "function_call": ("arguments", "response.function_call_arguments"),
    "mcp_call": ("arguments", "response.mcp_call_arguments"),
    "custom_tool_call": ("input", "response.custom_tool_call_input"),
}
"""By the type of an item: the field that its own deltas add to, and the stem of its events."""


def to_message(events: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, Any]]:
    """The status and the response that a client without streaming would have got.

    Raises:
        ValueError: the events hold no whole response.
    """
    done: dict[int, Any] = {}
    for event in events:
        kind = str(event.get("type", ""))
        if kind == "error":
            return 500, {"error": _error_of(event)}
        if kind == "response.output_item.done":
            done[event["output_index"]] = event["item"]
        if kind.removeprefix("response.") in _ENDS and kind.startswith("response."):
            response = dict(mapping(event.get("response")))
            # There are servers whose last event leaves the output out.
            response["output"] = response.get("output") or [done[index] for index in sorted(done)]
            return 200, response
    raise ValueError("no event has the whole response")


def _error_of(event: Mapping[str, Any]) -> dict[str, Any]:
    """The error of an event, which has it inside or is it itself."""
    said = mapping(event.get("error")) or event
    return {
        "message": said.get("message"),
        "type": "server_error",
        "param": said.get("param"),
        "code": said.get("code"),
    }


def to_events(response: Mapping[str, Any]) -> bytes:
    """The events that a streaming client would have got.

    Raises:
        ValueError: this is no response.
    """
    status = response.get("status")
    if not isinstance(status, str) or "output" not in response:
        raise ValueError("a response has a status and an output")
    opening: dict[str, Any] = {**response, "status": "in_progress", "output": [], "usage": None, "error": None}
    opening["incomplete_details"] = None
    made: list[dict[str, Any]] = [
        {"type": "response.created", "response": opening},
        {"type": "response.in_progress", "response": opening},
    ]
    for index, item in enumerate(items(response["output"])):
        made += _item_events(index, mapping(item))
    # A response that still runs has no last event: it is asked for again.
    made.append({"type": f"response.{status}", "response": dict(response)})
    numbered = [{**event, "sequence_number": number} for number, event in enumerate(made)]
    return b"".join(event_bytes(event, name=str(event["type"])) for event in numbered)


def _item_events(index: int, item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One item of the output, opened, filled and closed."""
    kind = str(item.get("type", ""))
    empty = {**item, "status": "in_progress"} if "status" in item else dict(item)
    empty |= {field: [] for field in ("content", "summary") if isinstance(item.get(field), list)}
    place = {"item_id": item.get("id"), "output_index": index}
    own: list[dict[str, Any]] = []
    if kind in _ARGUMENTS:
        field, stem = _ARGUMENTS[kind]
        text = item.get(field) or ""
        empty[field] = ""
        own = [{"type": f"{stem}.delta", **place, "delta": text}, {"type": f"{stem}.done", **place, field: text}]
    yield {"type": "response.output_item.added", "output_index": index, "item": empty}
    yield from own
    for number, part in enumerate(items(item.get("summary"))):
        yield from _summary_events({**place, "summary_index": number}, mapping(part))
    for number, part in enumerate(items(item.get("content"))):
        yield from _part_events({**place, "content_index": number}, mapping(part))
    yield {"type": "response.output_item.done", "output_index": index, "item": dict(item)}


def _summary_events(place: dict[str, Any], part: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    stem, text = "response.reasoning_summary", part.get("text", "")
    yield {"type": f"{stem}_part.added", **place, "part": {**part, "text": ""}}
    yield {"type": f"{stem}_text.delta", **place, "delta": text}
    yield {"type": f"{stem}_text.done", **place, "text": text}
    yield {"type": f"{stem}_part.done", **place, "part": dict(part)}


def _part_events(place: dict[str, Any], part: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A part of an item's content. A kind without deltas is added complete."""
    known = _TEXT_PARTS.get(str(part.get("type", "")))
    if known is None:
        yield {"type": "response.content_part.added", **place, "part": dict(part)}
        yield {"type": "response.content_part.done", **place, "part": dict(part)}
        return
    field, stem = known
    text = part.get(field, "")
    shared: dict[str, Any] = {"logprobs": part.get("logprobs") or []} if stem == "response.output_text" else {}
    empty: dict[str, Any] = {**part, field: ""} | {name: [] for name in ("annotations", "logprobs") if name in part}
    yield {"type": "response.content_part.added", **place, "part": empty}
    yield {"type": f"{stem}.delta", **place, "delta": text, **shared}
    for number, annotation in enumerate(items(part.get("annotations"))):
        marked = {"annotation_index": number, "annotation": annotation}
        yield {"type": f"{stem}.annotation.added", **place, **marked}
    yield {"type": f"{stem}.done", **place, field: text, **shared}
    yield {"type": "response.content_part.done", **place, "part": dict(part)}
