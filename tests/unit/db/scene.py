"""A session in a database with the usual things in it: what the tests of torpor.db start from."""

import json
import random
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeVar

from torpor.core.call import Call, RequestKey, ResponseHead
from torpor.core.checkpoint import Checkpoint, OpenStream
from torpor.core.events import Event, EventDraft, Kind
from torpor.core.ids import (
    CallId,
    KeyId,
    NodeId,
    SessionId,
    StreamId,
    new_call_id,
    new_checkpoint_id,
    new_session_id,
    new_snapshot_id,
)
from torpor.core.money import Bill
from torpor.db import answers, calls, log, notes, requests, sessions
from torpor.db.answers import Packed
from torpor.db.calls import Chunk, NewCall
from torpor.db.database import Database, Row, Transaction, Value
from torpor.db.keys import WrappedKey
from torpor.db.requests import RequestHead
from torpor.db.roots import Move

T = TypeVar("T")
NOW = 1_700_000_000_000_000_000
HEAD = ResponseHead(status=200, reason="OK", headers=(("content-type", "text/event-stream"),))
REQUEST_HEAD = RequestHead(method="POST", target="/v1/messages", headers=(("accept", "*/*"),))


class Scene:
    """One owner of one session."""

    def __init__(self, database: Database, session_id: SessionId, owner_token: int) -> None:
        self.database = database
        self.session_id = session_id
        self.owner_token = owner_token
        self._streams = 0

    @property
    def owner(self) -> dict[str, object]:
        return {"session_id": self.session_id, "owner_token": self.owner_token}

    async def write(self, work: Callable[[Transaction], T], *, durable: bool = False) -> T:
        return await self.database.write(work, durable=durable)

    async def read(self, work: Callable[[Transaction], T]) -> T:
        return await self.database.read(work)

    def new_call(self, key: str = "a", *, is_llm: bool = True) -> NewCall:
        self._streams += 1
        return NewCall(
            call_id=new_call_id(NOW),
            key=RequestKey(exact=f"{key}1", canonical=f"{key}2", logical=f"{key}3"),
            dialect="anthropic",
            method="POST",
            target="/v1/messages",
            model="m\ud800\0",
            incarnation=0,
            stream=StreamId(self._streams),
            request_bytes=100,
            is_llm=is_llm,
        )

    def intend(
        self, tx: Transaction, body: bytes = b'{"messages":[]}', *, is_llm: bool = True, **sending: bool
    ) -> Call:
        """A new call; `sending` is `at_once` and `usage_asked`."""
        prepared = requests.prepare(body)
        call = self.new_call(is_llm=is_llm)
        return calls.intend(tx, **self.owner, call=call, head=REQUEST_HEAD, body=prepared, wall_ns=NOW, **sending)

    def send(self, tx: Transaction, body: bytes = b'{"messages":[]}', *, head: ResponseHead = HEAD) -> CallId:
        """A call whose answer has begun to arrive."""
        call_id = self.intend(tx, body).call_id
        calls.mark_sent(tx, **self.owner, call_id=call_id, wall_ns=NOW)
        calls.record_head(tx, **self.owner, call_id=call_id, attempt=1, head=head, wall_ns=NOW)
        return call_id

    def add_chunks(self, tx: Transaction, call_id: CallId, *pieces: bytes, first: int = 0, attempt: int = 1) -> None:
        chunks = [Chunk(number=number, offset_ns=number, data=piece) for number, piece in enumerate(pieces, first)]
        calls.append_chunks(tx, **self.owner, call_id=call_id, attempt=attempt, chunks=chunks)

    def answer(
        self,
        tx: Transaction,
        *pieces: bytes,
        body: bytes = b'{"messages":[]}',
        head: ResponseHead = HEAD,
        bill: Bill | None = None,
    ) -> CallId:
        """A whole call."""
        call_id = self.send(tx, body, head=head)
        self.add_chunks(tx, call_id, *pieces)
        calls.complete(tx, **self.owner, call_id=call_id, usage={"input_tokens": 1}, bill=bill, wall_ns=NOW)
        return call_id

    def note(self, tx: Transaction, text: str, *, kind: Kind = Kind.NOTE_ADDED) -> Event:
        """A note, with the call that brought it."""
        call_id = self.intend(tx).call_id
        return notes.add(tx, **self.owner, kind=kind, incarnation=0, call_id=call_id, text=text, wall_ns=NOW)

    def old_note(self, tx: Transaction, text: str) -> Event:
        """A note as it was written before its text was a block."""
        draft = EventDraft(kind=Kind.NOTE_ADDED, incarnation=0, call_id=self.intend(tx).call_id, data={"text": text})
        return log.append(tx, **self.owner, drafts=[draft], wall_ns=NOW)[0]

    def with_chunks(self, tx: Transaction, *, has_row: bool) -> Packed:
        """A whole answer whose chunks are still there, with or without the row that replaces them."""
        call_id = self.send(tx)
        self.add_chunks(tx, call_id, b"long", b"answer")
        packed = replace(answers.pack(tx, call_id, 1), ahead=True)
        ended = packed if has_row else replace(packed, stored=None)
        calls.complete(tx, **self.owner, call_id=call_id, usage={}, packed=ended, wall_ns=NOW)
        return packed

    def checkpoint(self, number: int, seq: int, *open_calls: CallId) -> Checkpoint:
        streams = [
            OpenStream(stream=StreamId(n), port=4100, call_id=call_id, read=100, acknowledged=100, taken=0)
            for n, call_id in enumerate(open_calls)
        ]
        return Checkpoint(
            checkpoint_id=new_checkpoint_id(NOW),
            session_id=self.session_id,
            number=number,
            seq=seq,
            committed_seq=0,
            cursor_seq=1,
            incarnation=0,
            snapshot_id=new_snapshot_id(NOW),
            manifest_digest="ab" * 32,
            has_memory=True,
            open_streams=tuple(streams),
            next_stream=5,
            stdout_bytes=0,
            stderr_bytes=0,
            reason="call",
            wall_ns=NOW,
            freeze_ns=1,
            commit_ns=2,
            raw_bytes=3,
            stored_bytes=4,
            joinable=tuple(open_calls),
        )

    def move(self, point: Checkpoint) -> Move:
        """The checkpoint to a snapshot of another name."""
        return Move(
            checkpoint_id=point.checkpoint_id,
            seen_id=point.snapshot_id,
            snapshot_id=new_snapshot_id(NOW),
            manifest_digest="cd" * 32,
        )


class StaleFirst:
    """A transaction that tries each statement with another owner token first, and demands that it does nothing."""

    def __init__(self, inner: Transaction) -> None:
        self._inner = inner
        self.tried: list[str] = []

    def one(self, query: str, /, **values: Value) -> Row | None:
        if "owner_token" in values:
            self.tried.append(query)
            assert self._inner.one(query, **{**values, "owner_token": 99}) is None, query
        return self._inner.one(query, **values)

    def all(self, query: str, /, **values: Value) -> list[Row]:
        return self._inner.all(query, **values)

    def fetch(self, key: str, /) -> bytes:
        return self._inner.fetch(key)

    def run(self, query: str, /, **values: Value) -> int:
        self.tried.append(query)
        assert self._inner.run(query, **{**values, "owner_token": 99}) == 0, query
        return self._inner.run(query, **values)


def wrapped_key(whose: str, master: str = "key_m") -> WrappedKey:
    sealed = f"{whose} {master}".encode()
    return WrappedKey(whose=whose, key_id=KeyId(f"key_of_{whose}"), master_id=KeyId(master), wrapped=sealed)


async def new_scene(database: Database, name: str | None = None, **spec: object) -> Scene:
    """A new session, acquired."""
    session_id = new_session_id(NOW)

    def work(tx: Transaction) -> int:
        sessions.create(tx, session_id=session_id, name=name, spec={"argv": ["a\udcff"], **spec}, wall_ns=NOW)
        return acquire(tx, session_id, seen_token=0)

    return Scene(database, session_id, await database.write(work, durable=True))


def acquire(tx: Transaction, session_id: SessionId, *, seen_token: int) -> int:
    return sessions.acquire(
        tx,
        session_id=session_id,
        seen_token=seen_token,
        node_id=NodeId("node_1"),
        boot_id="boot",
        pid=1,
        wall_ns=NOW,
    )


def dump(path: Path) -> list[str]:
    """Every row of a SQLite file, as SQL."""
    connection = sqlite3.connect(path)
    try:
        return list(connection.iterdump())
    finally:
        connection.close()


def conversation(turns: int, *, marker: bool = True) -> bytes:
    """The request body of a coding agent at its n-th turn, as Anthropic's clients send it."""
    messages = ['{"role":"user","content":"Fix the bug."}', *map(_turn, range(turns))]
    if marker and turns:
        messages[-1] = messages[-1].removesuffix("}]}") + ',"cache_control":{"type":"ephemeral"}}]}'
    text = f'{{"model":"m","max_tokens":32000,"messages":[{",".join(messages)}],{_fixed_part()},"stream":true}}'
    return text.encode()


@cache
def _turn(turn: int) -> str:
    """What one turn adds: the assistant's step and the result of its tool."""
    use = {"type": "tool_use", "id": f"toolu_{turn:06}", "name": "bash", "input": {"command": f"pytest -k {turn}"}}
    text = {"type": "text", "text": f"Let me look at step {turn}. " + _words(turn, 30)}
    result = {"type": "tool_result", "tool_use_id": f"toolu_{turn:06}", "content": _words(turn * 7 + 1, 120)}
    messages = [{"role": "assistant", "content": [text, use]}, {"role": "user", "content": [result]}]
    return json.dumps(messages, separators=(",", ":"))[1:-1]


@cache
def _fixed_part() -> str:
    """A system prompt of about 35 kB and 30 tools, most of them short."""
    system = [{"type": "text", "text": _words(3, 5000), "cache_control": {"type": "ephemeral"}}]
    tools = [
        {"name": f"tool{n}", "description": _words(n, 40), "input_schema": {"type": "object", "properties": {"a": n}}}
        for n in range(30)
    ]
    return json.dumps({"system": system, "tools": tools}, separators=(",", ":"))[1:-1]


def _words(seed: int, count: int) -> str:
    """Text that compresses about as well as text does."""
    return " ".join(random.Random(seed).choices(_VOCABULARY, k=count))


_VOCABULARY = [
    before + word + after
    for before in ("re", "un", "con", "pre", "")
    for word in ("test", "file", "pass", "line", "fail", "def")
    for after in ("ing", "ed", "s", "_1", ".py", "\n", "():")
]
