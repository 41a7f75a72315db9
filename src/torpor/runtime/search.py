"""Full-text search over everything that is logged. The index is filled when somebody searches, up to a watermark.

It lies in a file of its own, so filling it never makes a node's writes wait, and a crash leaves it behind the log by
some events. It holds nothing that the log does not: redaction and `rm` delete it, and the next search makes it anew.
What is damaged in the log can't be found; `torpor log --verify` lists it.
"""

import json
import re
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from torpor.core.errors import Damaged
from torpor.core.events import Event, Kind
from torpor.core.ids import CallId, SessionId
from torpor.db import calls, log, notes, outputs, sessions
from torpor.db.database import Database, Transaction
from torpor.db.requests import BASES_TRIED
from torpor.db.sqlite import open_sqlite
from torpor.gateway.transcript import read_answer
from torpor.runtime.home import Home
from torpor.runtime.turns import FreshParts, decoded, read_response

MARK_START, MARK_END = "\x02", "\x03"
_EVENTS_AT_ONCE = 200
_WORD_CHARACTERS_MAX = 1_000
"""A longer run without a space is no word: an image, a key, a ciphertext."""
_STRING = re.compile(r'"((?:[^"\\]|\\.)*+)"(\s*:)?', re.DOTALL)
"""A string of JSON text, and whether it is a key."""
_CHANNELS = {outputs.STDOUT: "stdout", outputs.STDERR: "stderr"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """One place where the words are.

    Attributes:
        source: request, answer, note, event, stdout or stderr.
        excerpt: what stands around them; each word between MARK_START and MARK_END.
    """

    session_id: SessionId
    seq: int | None
    turn: int | None
    source: str
    excerpt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    content: str
    seq: int | None
    turn: int | None
    source: str


class SearchIndex:
    """The index beside one database. Build it with `open_index`."""

    def __init__(self, index: Database, database: Database) -> None:
        self._index = index
        self._database = database

    async def find(self, words: list[str], *, session_id: SessionId | None, limit: int) -> list[Match]:
        """The best matches of all the words, after the index was brought up to the log's heads.

        Words are taken as they are; one that ends in `*` fits every word that begins so, one with spaces is a phrase.
        """
        await self._catch_up(session_id)
        match = " AND ".join(_quoted(word) for word in words)

        def work(tx: Transaction) -> list[Match]:
            rows = tx.all(
                "search/find_matches",
                words=match,
                session_id=session_id,
                row_limit=limit,
                mark_start=MARK_START,
                mark_end=MARK_END,
            )
            return [
                Match(
                    session_id=SessionId(row["session_id"]),
                    seq=row["seq"],
                    turn=row["turn"],
                    source=row["source"],
                    excerpt=row["excerpt"],
                )
                for row in rows
            ]

        return await self._index.read(work)

    async def _catch_up(self, session_id: SessionId | None) -> None:
        known = await self._database.read(sessions.list_newest)
        for session in known:
            if session_id is None or session.session_id == session_id:
                while await self._step(session.session_id):
                    pass

    async def _step(self, session_id: SessionId) -> bool:
        """Index some more of a session; whether there may be more."""

        def begin(tx: Transaction) -> Mapping[str, Any]:
            tx.run("search/insert_watermark", session_id=session_id)
            row = tx.one("search/find_watermark", session_id=session_id)
            assert row is not None
            return dict(row)

        seen = await self._index.write(begin, durable=False)
        texts, moved = await self._database.read(lambda tx: _new_texts(tx, session_id, seen))
        if moved == seen:
            return False

        def store(tx: Transaction) -> None:
            changed = tx.run(
                "search/move_watermark_if_unchanged",
                session_id=session_id,
                seen_seq=seen["seq"],
                seen_output=seen["output"],
                **moved,
            )
            for text in texts if changed else ():
                tx.run(
                    "search/insert_text",
                    content=_storable(text.content),
                    session_id=session_id,
                    seq=text.seq,
                    turn=text.turn,
                    source=text.source,
                )

        await self._index.write(store, durable=False)
        return True


@asynccontextmanager
async def open_index(home: Home, database: Database, clock: Any) -> AsyncGenerator[SearchIndex]:
    """Open the index, or begin a new one."""
    index = await open_sqlite(str(home.search_index), clock=clock, schema="search")
    try:
        yield SearchIndex(index, database)
    finally:
        await index.close()


def _new_texts(tx: Transaction, session_id: SessionId, seen: Mapping[str, Any]) -> tuple[list[_Text], dict[str, Any]]:
    """The next texts behind a watermark, and where it is then."""
    turn = seen["turn"]
    texts: list[_Text] = []
    events = log.events(tx, session_id, after_seq=seen["seq"], limit=_EVENTS_AT_ONCE)
    fresh = _FreshTexts(tx, session_id, after_seq=seen["seq"]) if events else None
    for event in events:
        if event.kind is Kind.CALL_INTENDED and event.data.get("is_llm"):
            turn += 1
        for source, content in _texts_of(tx, event, fresh):
            texts.append(_Text(content=content, seq=event.seq, turn=turn or None, source=source))
    places: dict[str, list[int]] = json.loads(seen["output"])
    for channel, source in _CHANNELS.items():
        incarnation, position = places.get(str(channel), [-1, -1])
        rows = tx.all(
            "output/list_rows_after",
            session_id=session_id,
            channel=channel,
            incarnation=incarnation,
            position=position,
            row_limit=_EVENTS_AT_ONCE,
        )
        if rows:
            content = b"".join(bytes(row["data"]) for row in rows).decode(errors="replace")
            texts.append(_Text(content=content, seq=None, turn=None, source=source))
            places[str(channel)] = [rows[-1]["incarnation"], rows[-1]["position"]]
    seq = events[-1].seq if events else seen["seq"]
    output = json.dumps(places, sort_keys=True) if places else seen["output"]
    return texts, {"seq": seq, "turn": turn, "output": output}


class _FreshTexts:
    """What each request says for the first time: a piece that only lost its cache marker says nothing new."""

    def __init__(self, tx: Transaction, session_id: SessionId, *, after_seq: int) -> None:
        self._parts = FreshParts(session_id)
        self._recent: deque[frozenset[str]] = deque(maxlen=BASES_TRIED)
        before = [call for call in calls.load_calls(tx, session_id) if call.intended_seq <= after_seq]
        for call in before[-BASES_TRIED:]:
            self.of(tx, call.call_id)

    def of(self, tx: Transaction, call_id: CallId) -> str:
        try:
            values = _values(self._parts.of(tx, call_id).decode(errors="replace"))
        except Damaged:
            values = []
        known = frozenset[str]().union(*self._recent)
        self._recent.append(frozenset(values))
        return "\n".join(value for value in values if value not in known)


def _texts_of(tx: Transaction, event: Event, fresh: _FreshTexts | None) -> Iterator[tuple[str, str]]:
    """What can be found of an event: of a call's, its request's new part or its answer."""
    if event.call_id is not None and event.kind is Kind.CALL_INTENDED and fresh is not None:
        yield "request", fresh.of(tx, event.call_id)
    elif event.call_id is not None and event.kind in {Kind.CALL_COMPLETED, Kind.CALL_FAILED}:
        call = calls.load_call(tx, event.call_id)
        try:
            head, body, _ = read_response(tx, call)
        except Damaged:
            head, body = None, b""
        answered = read_answer(call.dialect, decoded(() if head is None else head.headers, body))
        said = [part.text or " ".join(_values(json.dumps(part.data))) for part in answered.message.parts]
        yield "answer", "\n".join([*said, *([str(event.data["error"])] if "error" in event.data else [])])
    elif notes.has_text(event):
        yield "note", notes.read(tx, event).text
    elif event.call_id is None:
        yield "event", " ".join([event.kind.value, *_values(json.dumps(dict(event.data)))])


def _values(text: str) -> list[str]:
    """The strings of JSON text, as they are meant, without its keys; the text itself where there is none."""
    found = [_unescaped(string[1]) for string in _STRING.finditer(text) if string[2] is None]
    return [value for value in found if " " in value or len(value) <= _WORD_CHARACTERS_MAX] or [text]


def _unescaped(raw: str) -> str:
    try:
        return json.loads(f'"{raw}"', strict=False)
    except ValueError:
        return raw


def _storable(text: str) -> str:
    """An agent may send halves of characters; a database's text has none."""
    return text.encode("utf-8", "replace").decode()


def _quoted(word: str) -> str:
    """A word or phrase as FTS5 takes it literally."""
    begins = word.endswith("*") and len(word) > 1
    plain = word.removesuffix("*").replace('"', '""')
    return _storable(f'"{plain}"{"*" if begins else ""}')
