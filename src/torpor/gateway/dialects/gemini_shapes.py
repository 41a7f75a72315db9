"""One Gemini answer in its shapes: each event is built as the whole answer is, and holds the next parts of it."""

from collections.abc import Iterable, Mapping
from typing import Any

from torpor.gateway.dialects.base import items, mapping
from torpor.gateway.dialects.sse import event_bytes


def to_message(events: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, Any]]:
    """The status and the answer that a client without streaming would have got.

    Raises:
        ValueError: there is no event at all.
    """
    answer: dict[str, Any] = {}
    candidates: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.get("error"):
            code = mapping(event["error"]).get("code")
            return (code if isinstance(code, int) and 400 <= code < 600 else 500), dict(event)
        answer |= {key: value for key, value in event.items() if key != "candidates"}
        for part in items(event.get("candidates")):
            _add_candidate(candidates, mapping(part))
    if not answer and not candidates:
        raise ValueError("no event has a part of an answer")
    if candidates:
        answer = {"candidates": [candidates[index] for index in sorted(candidates)], **answer}
    return 200, answer


def _add_candidate(candidates: dict[int, dict[str, Any]], piece: Mapping[str, Any]) -> None:
    candidate = candidates.setdefault(piece.get("index", 0), {})
    content = mapping(piece.get("content"))
    if content:
        known = candidate.setdefault("content", {"parts": []})
        known |= {key: value for key, value in content.items() if key != "parts"}
        for part in items(content.get("parts")):
            _add_part(known["parts"], mapping(part))
    candidate |= {key: value for key, value in piece.items() if key != "content"}


def _add_part(parts: list[dict[str, Any]], part: Mapping[str, Any]) -> None:
    """A text goes on with the text before it; anything else, a signature above all, stays a part of its own."""
    plain = part.keys() <= {"text", "thought"} and "text" in part
    if plain and parts and parts[-1].keys() == part.keys() and parts[-1].get("thought") == part.get("thought"):
        parts[-1]["text"] += part["text"]
    else:
        parts.append(dict(part))


def to_events(message: Mapping[str, Any]) -> bytes:
    """The one event that holds the whole answer, which is a stream as good as any.

    Raises:
        ValueError: this is no answer.
    """
    if not message:
        raise ValueError("an answer has something in it")
    return event_bytes(message)
