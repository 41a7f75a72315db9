"""A session's context as JSON lines, and back: the chain comes back as it was, snapshots do not.

One object a line: the session first, then its blocks, calls, output and events, then an end that counts them. What is
imported is checked as `log --verify` does before it counts; it can be read and searched, and is never resumed.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from torpor.core.errors import Conflict, InvalidInput
from torpor.core.ids import SessionId
from torpor.db import sessions, verify
from torpor.db.database import Transaction, Value

FORMAT = "torpor-session-1"
TABLES = ("block", "call", "attempt", "answer", "chunk", "request", "output", "event")
"""In the order in which their rows refer to each other."""


def export_lines(tx: Transaction, session_id: SessionId) -> Iterator[dict[str, Any]]:
    """Every row of a session's context as JSON objects."""
    row = tx.one("session/find_by_id", session_id=session_id)
    assert row is not None
    yield {"format": FORMAT, **_fields({name: row[name] for name in _SESSION_FIELDS})}
    count = 0
    for table in TABLES:
        for found in tx.all(f"transfer/list_{table}s", session_id=session_id):
            count += 1
            yield {"row": table, **_fields(found)}
    yield {"end": count}


def import_lines(tx: Transaction, lines: Iterable[str]) -> SessionId:
    """Store an exported session, in one transaction.

    Raises:
        InvalidInput: `import_unreadable`, these are not lines that an export wrote, or the chain does not hold.
        Conflict: `session_exists`.
    """
    read = _objects(lines)
    nothing: dict[str, Any] = {}
    envelope: Mapping[str, Any] = next(read, nothing)
    if envelope.get("format") != FORMAT:
        raise _unreadable("it does not begin with a session")
    session_id = SessionId(str(envelope.get("session_id")))
    if tx.one("session/find_by_id", session_id=session_id) is not None:
        raise Conflict("session_exists", f"cannot import session {session_id}: it is here already")
    name = envelope.get("name")
    if name is not None and tx.one("session/find_by_name", name=str(name)) is not None:
        envelope = {**envelope, "name": None}
    try:
        tx.run("transfer/insert_session", **_values(envelope, _SESSION_FIELDS))
        for count, fields in enumerate(read):
            if "end" in fields:
                if fields["end"] != count:
                    raise _unreadable("lines are missing")
                break
            table = fields.get("row")
            if table not in TABLES or fields.get("session_id", session_id) != session_id:
                raise _unreadable(f"line {count + 2} is no row of the session")
            tx.run(f"transfer/insert_{table}", **_values(fields, _COLUMNS[table]))
        else:
            raise _unreadable("it is cut off")
        sessions.get(tx, session_id)  # its status and its spec can be read
        problems = verify.verify_chain(tx, session_id)
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(str(error)) from error
    if problems:
        raise _unreadable(f"its log does not hold: {problems[0].text}")
    return session_id


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
)
_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "block": ("session_id", "digest", "codec", "size_bytes", "data"),
    "call": (
        *("call_id", "session_id", "state", "key_exact", "key_canonical", "key_logical", "about", "incarnation"),
        *("stream", "request_bytes", "intended_seq", "ended_seq", "usage"),
    ),
    "attempt": (
        *("call_id", "number", "sent_ns", "head", "chunk_count", "body_bytes", "finished"),
        *("reserved_nanousd", "cost_nanousd"),
    ),
    "answer": ("call_id", "attempt", "codec", "layout", "data"),
    "chunk": ("call_id", "attempt", "number", "offset_ns", "data"),
    "request": ("call_id", "session_id", "number", "head", "head_digest", "manifest", "body_digest", "body_bytes"),
    "output": ("session_id", "channel", "incarnation", "position", "data", "wall_ns"),
    "event": (
        *("session_id", "seq", "parent_seq", "incarnation", "wall_ns", "kind", "call_id", "data", "refs"),
        *("prev_hash", "hash"),
    ),
}


_NOT_ALWAYS = frozenset({"budget_nanousd", "reserved_nanousd", "cost_nanousd"})
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
