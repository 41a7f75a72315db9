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


def _spellings(kind: str, number: int) -> tuple[str, tuple[RequestKey, ...]]:
    fields: dict[str, object] = {"name": f"{kind} {number}", "count": number}
    if kind == "llm":
        first = json.dumps({**fields, "stream": True}).encode()
        other = json.dumps({"stream": True, **fields}).encode()
        plain = json.dumps(fields).encode()
        keys = tuple(_key("openai_chat", "POST", "/v1/chat/completions", body) for body in (first, other, plain))
        return "POST", keys
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
