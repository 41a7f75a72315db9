"""A session's context as JSON lines, and back: the chain comes back as it was, snapshots do not.

One object a line: the session first, then its blobs, blocks, calls, output and events, then an end that counts them.
What is imported is checked as `log --verify` does before it counts; it can be read and searched, and is never resumed.
"""

import asyncio
import base64
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from torpor.core.crash import crash_point
from torpor.core.errors import Conflict, Damaged, InvalidInput, NotFound
from torpor.core.ids import SessionId, parse_session_id
from torpor.db import ahead, blobs, sessions, verify
from torpor.db.database import BlobStore, Database, Transaction, Value
from torpor.runtime.home import Home

FORMAT = "torpor-session-1"
TABLES = ("block", "call", "attempt", "answer", "chunk", "request", "output", "waitpoint", "message", "event")
"""In the order in which their rows refer to each other."""


def export_lines(tx: Transaction, session_id: SessionId) -> Iterator[dict[str, Any]]:
    """Every blob and every row of a session's context as JSON objects.

    Raises:
        Damaged: `blob_damaged`, an export without it would not import.
    """
    row = tx.one("session/find_by_id", session_id=session_id)
    assert row is not None
    yield {"format": FORMAT, **_fields({name: row[name] for name in _SESSION_FIELDS})}
    count = 0
    for line in _blob_lines(tx, session_id):
        count += 1
        yield line
    for table in TABLES:
        for found in tx.all(f"transfer/list_{table}s", session_id=session_id):
            count += 1
            yield {"row": table, **_fields(found)}
    yield {"end": count}


class Incoming:
    """An export that is being read, each part once: `put_blobs`, then `store`.

    Raises:
        InvalidInput: `import_unreadable`, these are not lines that an export wrote, or the chain does not hold.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = _objects(lines)
        nothing: dict[str, Any] = {}
        self._envelope: Mapping[str, Any] = next(self._lines, nothing)
        if self._envelope.get("format") != FORMAT:
            raise _unreadable("it does not begin with a session")
        try:
            self.session_id = parse_session_id(str(self._envelope.get("session_id")))
        except InvalidInput as error:
            raise _unreadable("it does not name its session") from error
        self._count = 0
        self._next = next(self._lines, nothing)

    def is_here(self, tx: Transaction) -> bool:
        return _is_here(tx, self.session_id)

    def put_blobs(self, store: BlobStore) -> None:
        """Put the blobs into the store, where they belong to nobody until their rows are stored too."""
        try:
            while self._next.get("row") == _BLOB:
                digest, data = self._read_blob()
                if hashlib.sha256(data).digest() != digest:
                    raise _unreadable(f"line {self._count + 1} ends a blob that has other bytes")
                blobs.put(store, self.session_id, digest, data)
                crash_point("blob.stored")
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(str(error)) from error

    def store(self, tx: Transaction) -> SessionId:
        """Store the rows.

        Raises:
            Conflict: `session_exists`.
        """
        check_new(tx, self.session_id)
        envelope, name = self._envelope, self._envelope.get("name")
        if name is not None and tx.one("session/find_by_name", name=str(name)) is not None:
            envelope = {**envelope, "name": None}
        try:
            tx.run("transfer/insert_session", **_values(envelope, _SESSION_FIELDS))
            while "end" not in self._next:
                fields = self._take()
                table = fields.get("row")
                if table not in TABLES or fields.get("session_id", self.session_id) != self.session_id:
                    raise _unreadable(f"line {self._count + 1} is no row of the session")
                tx.run(f"transfer/insert_{table}", **_values(fields, _COLUMNS[table]))
            if self._next["end"] != self._count:
                raise _unreadable("lines are missing")
            sessions.get(tx, self.session_id)  # its status and its spec can be read
            problems = verify.verify_chain(tx, self.session_id)
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(str(error)) from error
        if problems:
            raise _unreadable(f"its log does not hold: {problems[0].text}")
        return self.session_id

    def _take(self) -> Mapping[str, Any]:
        """The line that is next, which is not the end."""
        taken = self._next
        if not taken:
            raise _unreadable("it is cut off")
        self._count += 1
        nothing: dict[str, Any] = {}
        self._next = next(self._lines, nothing)
        return taken

    def _read_blob(self) -> tuple[bytes, bytes]:
        """A blob's name and its bytes, from as many lines as it has."""
        first = self._next
        data = bytearray()
        while not data or len(data) < first["bytes"]:
            fields = self._take()
            part = _value(fields["data"])
            if fields.get("row") != _BLOB or fields["blob"] != first["blob"] or not isinstance(part, bytes) or not part:
                raise _unreadable(f"line {self._count + 1} does not go on with the blob before it")
            data += part
        return bytes.fromhex(first["blob"]), bytes(data)


async def bring_in(
    incoming: Incoming, database: Database, home: Home, also: Callable[[Transaction], None] = lambda _: None
) -> None:
    """Store a session whose lock is held: its blobs first, then its rows in one transaction. Else nothing stays of it.

    Args:
        also: what else is to be in that transaction.

    Raises:
        InvalidInput: `import_unreadable`.
        Conflict: `session_exists`.
    """
    try:
        if database.blobs is not None:
            await asyncio.to_thread(incoming.put_blobs, database.blobs)
        await database.write(lambda tx: (incoming.store(tx), also(tx)), durable=True)
    except BaseException:
        if not await database.read(incoming.is_here):
            await asyncio.to_thread(shutil.rmtree, home.session(incoming.session_id), ignore_errors=True)
        raise
    finally:
        await ahead.sweep(database, incoming.session_id)


def check_new(tx: Transaction, session_id: SessionId) -> None:
    """Raises Conflict: `session_exists`."""
    if _is_here(tx, session_id):
        raise Conflict("session_exists", f"cannot import session {session_id}: it is here already")


def _is_here(tx: Transaction, session_id: SessionId) -> bool:
    return tx.one("session/find_by_id", session_id=session_id) is not None


def import_lines(tx: Transaction, lines: Iterable[str]) -> SessionId:
    """Store an exported session without blobs, in one transaction.

    Raises:
        As `Incoming` and its `store`.
    """
    return Incoming(lines).store(tx)


def _blob_lines(tx: Transaction, session_id: SessionId) -> Iterator[dict[str, Any]]:
    for key in sorted(blobs.list_named_of(tx, session_id)):
        name = key.rpartition("_")[2]
        try:
            data = tx.fetch(key)
        except NotFound:
            data = b""
        if hashlib.sha256(data).hexdigest() != name:
            raise Damaged(
                "blob_damaged",
                f"cannot export session {session_id}: its blob {name} is missing or not what was written",
                hint=f"`torpor log {session_id} --verify` says whose it is.",
            )
        for at in range(0, len(data), _LINE_BYTES):
            part = _fields({"data": data[at : at + _LINE_BYTES]})
            yield {"row": _BLOB, "blob": name, "bytes": len(data), **part}


_BLOB = "blob"
_LINE_BYTES = 1 << 20
_SESSION_FIELDS = (
    "session_id",
    "name",
    "status",
    "spec",
    "incarnation",
    "head_seq",
    "head_hash",
    "cursor_seq",
    "created_ns",
    "updated_ns",
    "exit_status",
    "budget_nanousd",
    "parent_id",
    "forked_at_seq",
    "inbox_from",
    "outbox_from",
)
_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "block": ("session_id", "digest", "codec", "size_bytes", "data", "blob"),
    "call": (
        *("call_id", "session_id", "state", "key_exact", "key_canonical", "key_logical", "about", "incarnation"),
        *("stream", "request_bytes", "intended_seq", "ended_seq", "usage"),
    ),
    "attempt": (
        *("call_id", "number", "sent_ns", "head", "chunk_count", "body_bytes", "finished"),
        *("reserved_nanousd", "cost_nanousd"),
    ),
    "answer": ("call_id", "attempt", "codec", "layout", "data", "blob"),
    "chunk": ("call_id", "attempt", "number", "offset_ns", "data"),
    "request": ("call_id", "session_id", "number", "head", "head_digest", "manifest", "body_digest", "body_bytes"),
    "output": ("session_id", "channel", "incarnation", "position", "data", "wall_ns"),
    "event": (
        *("session_id", "seq", "parent_seq", "incarnation", "wall_ns", "kind", "call_id", "data", "refs"),
        *("prev_hash", "hash"),
    ),
    "waitpoint": (
        *("waitpoint_id", "session_id", "kind", "call_id", "data", "created_ns", "due_ns", "resolved_ns"),
        "resolution",
    ),
    "message": ("session_id", "box", "number", "seq", "wall_ns", "digest", "size_bytes", "call_id"),
}


_NOT_ALWAYS = frozenset(
    {
        *("due_ns", "budget_nanousd", "parent_id", "forked_at_seq", "inbox_from", "outbox_from"),
        *("reserved_nanousd", "cost_nanousd", _BLOB),
    }
)
"""Columns that an export from before they existed lacks: then they are null."""


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes as {"base64": text}; everything else as it is."""
    return {
        name: {"base64": base64.b64encode(row[name]).decode()} if isinstance(row[name], bytes) else row[name]
        for name in row.keys()  # noqa: SIM118, a database's row iterates over its values
    }


def _values(fields: Mapping[str, Any], columns: Iterable[str]) -> dict[str, Value]:
    return {name: _value(fields.get(name) if name in _NOT_ALWAYS else fields[name]) for name in columns}


def _value(value: Any) -> Value:
    if isinstance(value, dict):
        return base64.b64decode(value["base64"], validate=True)  # pyright: ignore[reportUnknownArgumentType]
    if value is None or (isinstance(value, (str, int)) and not isinstance(value, bool)):
        return value
    raise ValueError("a value is neither text, number nor bytes")


def _objects(lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise _unreadable(f"line {number} is no JSON") from error
        if not isinstance(value, dict):
            raise _unreadable(f"line {number} is no object")
        yield cast("Mapping[str, Any]", value)


def _unreadable(reason: str) -> InvalidInput:
    return InvalidInput("import_unreadable", f"cannot import the session: {reason}")
