"""What simulated agents ask for: a pool of requests, each in three spellings, keyed by the real `request_key`."""

import json

from torpor.core.call import RequestKey
from torpor.core.match import request_key


class Ask:
    """One logical request; `keys` are its spellings: as first sent, with other key order, in another shape."""

    __slots__ = ("index", "keys", "kind", "length", "method")

    def __init__(self, index: int, kind: str, method: str, keys: tuple[RequestKey, ...]) -> None:
        self.index = index
        self.kind = kind
        self.method = method
        self.keys = keys
        self.length = 1 + index % 2
        """In pieces, as init reads them."""

    @property
    def is_llm(self) -> bool:
        return self.kind == "llm"


def _key(dialect: str, method: str, target: str, body: bytes) -> RequestKey:
    return request_key(
        dialect=dialect, method=method, target=target, headers=(("content-type", "application/json"),), body=body
    )


_LLM_PATHS = {
    "openai_chat": "/v1/chat/completions",
    "anthropic": "/v1/messages",
    "openai_responses": "/v1/responses",
    "gemini": "/v1beta/models/m:generateContent",
}
_GEMINI_STREAM = "/v1beta/models/m:streamGenerateContent?alt=sse"


def _llm_spellings(which: int, fields: dict[str, object]) -> tuple[RequestKey, ...]:
    """A streamed request; the same with another order of keys and fresh volatile fields; that without streaming."""
    dialect, path = list(_LLM_PATHS.items())[which]
    keys: list[RequestKey] = []
    for again, streamed in ((False, True), (True, True), (True, False)):
        turn = json.dumps({"turn_id": 1, "turn_started_at_unix_ms": int(again)})
        volatile = {
            "anthropic": {"metadata": {"user_id": f"session {again}"}},
            "openai_responses": {"client_metadata": {"x-codex-turn-metadata": turn}},
        }
        body = {**fields, **volatile.get(dialect, {})}
        if streamed and dialect != "gemini":
            body["stream"] = True
        ordered = sorted(body.items(), reverse=again)
        target = _GEMINI_STREAM if streamed and dialect == "gemini" else path
        keys.append(_key(dialect, "POST", target, json.dumps(dict(ordered)).encode()))
    return tuple(keys)


def _spellings(kind: str, number: int) -> tuple[str, tuple[RequestKey, ...]]:
    fields: dict[str, object] = {"name": f"{kind} {number}", "count": number}
    if kind == "llm":
        return "POST", _llm_spellings(number % len(_LLM_PATHS), fields)
    if kind == "read":
        return "GET", (_key("raw", "GET", f"/read/{number}", b""),)
    bodies = [json.dumps(dict(sorted(fields.items(), reverse=reverse))).encode() for reverse in (False, True)]
    return "POST", tuple(_key("raw", "POST", f"/{kind}/{number}", body) for body in bodies)


COUNTS = {"llm": 8, "effect": 3, "read": 2, "barrier": 2, "receive": 1}


def _pool() -> dict[str, tuple[Ask, ...]]:
    pool: dict[str, tuple[Ask, ...]] = {}
    index = 0
    for kind, count in COUNTS.items():
        asks: list[Ask] = []
        for number in range(count):
            method, keys = _spellings(kind, number)
            asks.append(Ask(index, kind, method, keys))
            index += 1
        pool[kind] = tuple(asks)
    return pool


POOL = _pool()
