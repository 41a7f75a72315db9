"""What a request is matched by: its exact bytes, its canonical form, and the logical call behind it (RECOVERY 5.2).

Clients re-send one logical request with other key order, with fresh time stamps, or without `stream`; see `VOLATILE`
and `SHAPE`. Two requests that differ in meaning never share a key: numbers are compared as they are spelled (0 is not
0.0), true is not 1, and a string of JSON is not the JSON. A body that is no JSON, repeats a key, or is too deep or too
large to take apart has one key for all three levels. Content-encoding is decoded before (with a bound) by the caller.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torpor.core.call import RequestKey

Fields: TypeAlias = Mapping[str, "Fields | None"]
"""Members of a JSON object to leave out (None), or to go into. A string that holds JSON is gone into as well."""

HEADERS_THAT_MATTER = ("anthropic-beta", "anthropic-version", "openai-beta")
"""They change what the answer means. Content-type counts too, without its parameters."""

VOLATILE: Mapping[str, Fields] = {
    "anthropic": {"metadata": {"user_id": None}},
    "openai_responses": {
        "client_metadata": {
            "x-codex-turn-metadata": {"turn_started_at_unix_ms": None, "workspaces": None},
            "x-codex-ws-stream-request-start-ms": None,
        }
    },
    # How long a client is still ready to wait. (A tool call of MCP has an id of its own, so it is never equal.)
    # What a step of the agent's came to is not what it is found by (gateway/effects.py).
    "torpor": {"timeout_seconds": None, "result": None},
}
"""By dialect: what a client fills in anew each time that it builds the same request. Other HTTP has none."""

SHAPE: Mapping[str, Fields] = {
    "anthropic": {"stream": None},
    "openai_chat": {"stream": None, "stream_options": None},
    "openai_responses": {"stream": None, "stream_options": None},
}
"""By dialect: what changes only how the answer is sent. A fallback without streaming is the same logical call.

Gemini says it in the address: see `_logical_target`.
"""

DEPTH_MAX = 100
NESTED_JSON_MAX = 4
MARKS_MAX = 500_000
"""Commas, colons and opening brackets: a cheap upper bound of how many values a hostile body makes."""


class _Number(str):
    """A JSON number as it was spelled."""

    __slots__ = ()


class _NotCanonical(ValueError):
    """This body is matched by its bytes only."""


def request_key(
    *, dialect: str, method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes
) -> RequestKey:
    """The three keys of a request whose body is already free of content-encoding."""
    rest = _headers_that_matter(headers)
    head = (method.upper(), target, *rest)
    exact = _digest("raw", head, body)
    volatile = VOLATILE.get(dialect, {})
    try:
        value = _parse_body(body)
        canonical = _digest("json", head, canonical_text(value, volatile).encode())
        shapeless = (method.upper(), _logical_target(dialect, target), *rest)
        logical = _digest("json", shapeless, canonical_text(value, {**volatile, **SHAPE.get(dialect, {})}).encode())
    except _NotCanonical:
        return RequestKey(exact=exact, canonical=exact, logical=exact)
    return RequestKey(exact=exact, canonical=canonical, logical=logical)


def canonical_text(value: Any, dropped: Fields) -> str:
    """Parsed JSON in its one spelling: sorted keys, numbers as written, JSON within strings taken apart behind an @."""
    return _render(value, dropped, depth=0, nested=0)


def _headers_that_matter(headers: Iterable[tuple[str, str]]) -> list[str]:
    found: dict[str, list[str]] = {}
    for name, value in headers:
        lower = name.lower()
        if lower == "content-type":
            found.setdefault(lower, []).append(value.partition(";")[0].strip().lower())
        elif lower in HEADERS_THAT_MATTER:
            found.setdefault(lower, []).append(value.strip())
    return [f"{name}: {', '.join(values)}" for name, values in sorted(found.items())]


def _logical_target(dialect: str, target: str) -> str:
    """The target without what only shapes the answer: Gemini streams by the path's verb and by `alt`."""
    if dialect != "gemini":
        return target
    path, _, query = target.partition("?")
    kept = [field for field in query.split("&") if field and not field.startswith("alt=")]
    return "?".join([path.replace(":streamGenerateContent", ":generateContent"), *(["&".join(kept)] if kept else [])])


def _digest(kind: str, head: Iterable[str], body: bytes) -> str:
    """SHA-256 over fields that each carry their length, so that no two lists of fields run together."""
    digest = hashlib.sha256(kind.encode())
    for part in (*(text.encode("utf-8", "surrogatepass") for text in head), body):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _parse_body(body: bytes) -> Any:
    if sum(body.count(mark) for mark in (b",", b":", b"[", b"{")) > MARKS_MAX:
        raise _NotCanonical("too many values")
    try:
        return _parse(body.decode())
    except UnicodeDecodeError as error:
        raise _NotCanonical("not UTF-8") from error


def _parse(text: str) -> Any:
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_int=_Number, parse_float=_Number, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise _NotCanonical("not JSON that has one meaning") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _NotCanonical("a key stands twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise _NotCanonical(f"{name} is not JSON")


def _render(value: Any, dropped: Fields, *, depth: int, nested: int) -> str:
    if depth > DEPTH_MAX:
        raise _NotCanonical("too deep")
    if type(value) is str:
        return _render_string(value, dropped, depth=depth, nested=nested)
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, dict):
        return _render_object(value, dropped, depth=depth, nested=nested)  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, list):
        items = [_render(item, {}, depth=depth + 1, nested=nested) for item in value]  # pyright: ignore[reportUnknownVariableType]
        return f"[{','.join(items)}]"
    return json.dumps(value)


def _render_object(value: dict[str, Any], dropped: Fields, *, depth: int, nested: int) -> str:
    members: list[str] = []
    for key in sorted(value):
        within = dropped.get(key, {})
        if within is not None:
            members.append(f"{json.dumps(key)}:{_render(value[key], within, depth=depth + 1, nested=nested)}")
    return f"{{{','.join(members)}}}"


def _render_string(text: str, dropped: Fields, *, depth: int, nested: int) -> str:
    if text[:1] not in {"{", "["} or nested == NESTED_JSON_MAX:
        return json.dumps(text)
    try:
        value = _parse(text)
    except _NotCanonical:
        return json.dumps(text)
    return "@" + _render(value, dropped, depth=depth + 1, nested=nested + 1)
