"""Puts a note of Torpor's own into a request to a model, where its API has a place for such words.

Only under the policy `tell`, and only on the way out: the log has the request as the agent sent it, by which it is
matched, and the note in an event of its own.
"""

import json
from collections.abc import Callable
from typing import Any, TypeAlias, cast

from torpor.gateway.dialects.sse import json_object

Body: TypeAlias = dict[str, Any]


def with_note(dialect: str, body: bytes, note: str) -> bytes | None:
    """The request with the note in it; None if this request has no place for one."""
    add = _ADDING.get(dialect)
    request = json_object(body)
    if add is None or request is None:
        return None
    changed = dict(request)
    return json.dumps(changed, ensure_ascii=False).encode("utf-8", "surrogatepass") if add(changed, note) else None


def _anthropic(body: Body, note: str) -> bool:
    system: object = body.get("system") or []
    blocks = [{"type": "text", "text": system}] if isinstance(system, str) else system
    return _append(body, "system", blocks, {"type": "text", "text": note})


def _openai_chat(body: Body, note: str) -> bool:
    return _append(body, "messages", body.get("messages"), {"role": "system", "content": note})


def _openai_responses(body: Body, note: str) -> bool:
    said = body.get("instructions") or ""
    if isinstance(said, str):
        body["instructions"] = f"{said}\n\n{note}" if said else note
    return isinstance(said, str)


def _gemini(body: Body, note: str) -> bool:
    name = "system_instruction" if "system_instruction" in body else "systemInstruction"
    system: object = body.get(name) or {}
    if not isinstance(system, dict):
        return False
    changed = dict(cast("Body", system))
    body[name] = changed
    return _append(changed, "parts", changed.get("parts") or [], {"text": note})


def _append(body: Body, name: str, present: object, item: Body) -> bool:
    if not isinstance(present, list):
        return False
    body[name] = [*cast("list[Any]", present), item]
    return True


_ADDING: dict[str, Callable[[Body, str], bool]] = {
    "anthropic": _anthropic,
    "openai_chat": _openai_chat,
    "openai_responses": _openai_responses,
    "gemini": _gemini,
}
