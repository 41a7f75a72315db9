"""The event log: appending under the fence, and reading. Nothing in here changes or removes an event.

An append holds the session's head first, then adds its events behind it, then moves the head onto the last one. All
three check the owner token, so a superseded node can do none of them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torpor.core.errors import Conflict
from torpor.core.events import Event, EventDraft, Kind, seal
from torpor.core.ids import CallId, SessionId
from torpor.db.database import Row, Transaction
from torpor.db.encoding import decode_json, encode_json
from torpor.db.fence import refusal

EVERYTHING = 2**62
"""A row limit that limits nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Where the log ends, and what else the session's row says, held until the commit."""

    seq: int
    hash: str
    cursor_seq: int
    incarnation: int
    has_budget: bool


def hold(tx: Transaction, *, session_id: SessionId, owner_token: int, wall_ns: int) -> Head:
    """Hold the head for an append that depends on it.

    Raises:
        Superseded: `owner_token` is not the session's.
    """
    row = tx.one("log/hold_head", session_id=session_id, owner_token=owner_token, wall_ns=wall_ns)
    if row is None:
        raise refusal(tx, session_id, owner_token, _head_moved(session_id))
    return Head(
        seq=row["head_seq"],
        hash=row["head_hash"],
        cursor_seq=row["cursor_seq"],
        incarnation=row["incarnation"],
        has_budget=row["budget_nanousd"] is not None,
    )


def append(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    drafts: Sequence[EventDraft],
    wall_ns: int,
    head: Head | None = None,
) -> list[Event]:
    """Add events behind the head, in order; `head` is what `hold` gave in this transaction, if it was asked.

    Raises:
        Superseded: `owner_token` is not the session's.
    """
    head = head or hold(tx, session_id=session_id, owner_token=owner_token, wall_ns=wall_ns)
    events: list[Event] = []
    seq, prev_hash = head.seq, head.hash
    for draft in drafts:
        event = seal(session_id=session_id, seq=seq + 1, draft=draft, wall_ns=wall_ns, prev_hash=prev_hash)
        if not tx.run("log/append_fenced", owner_token=owner_token, seen_seq=head.seq, **_columns(event)):
            raise refusal(tx, session_id, owner_token, _head_moved(session_id))
        events.append(event)
        seq, prev_hash = event.seq, event.hash
    moved = tx.run(
        "log/move_head_fenced",
        session_id=session_id,
        owner_token=owner_token,
        seen_seq=head.seq,
        seen_hash=head.hash,
        seq=seq,
        hash=prev_hash,
    )
    if not moved:
        raise refusal(tx, session_id, owner_token, _head_moved(session_id))
    return events


def events(tx: Transaction, session_id: SessionId, *, after_seq: int = 0, limit: int = EVERYTHING) -> list[Event]:
    """Up to `limit` events with a seq above `after_seq`, oldest first."""
    rows = tx.all("log/list_events", session_id=session_id, after_seq=after_seq, row_limit=limit)
    return [event_of(row) for row in rows]


def last_of_kind(tx: Transaction, session_id: SessionId, kind: Kind) -> Event | None:
    """The newest event of a kind."""
    row = tx.one("log/find_last_of_kind", session_id=session_id, kind=kind.value)
    return None if row is None else event_of(row)


def all_of_kind(tx: Transaction, session_id: SessionId, kind: Kind) -> list[Event]:
    """Every event of a kind, oldest first."""
    return [event_of(row) for row in tx.all("log/list_of_kind", session_id=session_id, kind=kind.value)]


@dataclass(frozen=True, slots=True)
class Hanging:
    """Where a context event hangs; the first one, the session's creation, has no parent."""

    seq: int
    parent_seq: int | None


def list_parents_of_calls(tx: Transaction, session_id: SessionId) -> list[Hanging]:
    """The context events of a session, oldest first, with no more of them than their places in the tree."""
    rows = tx.all("log/list_parents_of_calls", session_id=session_id)
    return [Hanging(row["seq"], row["parent_seq"]) for row in rows]


def counts(tx: Transaction, session_id: SessionId) -> Counter[Kind]:
    """How many events of each kind there are."""
    rows = tx.all("log/count_by_kind", session_id=session_id)
    return Counter({Kind(row["kind"]): row["events"] for row in rows})


def event_of(row: Row) -> Event:
    return Event(
        session_id=SessionId(row["session_id"]),
        seq=row["seq"],
        parent_seq=row["parent_seq"],
        incarnation=row["incarnation"],
        wall_ns=row["wall_ns"],
        kind=Kind(row["kind"]),
        call_id=CallId(row["call_id"]) if row["call_id"] is not None else None,
        data=decode_json(row["data"]),
        refs=tuple(decode_json(row["refs"])),
        prev_hash=row["prev_hash"],
        hash=row["hash"],
    )


def _columns(event: Event) -> dict[str, str | int | None]:
    return {
        "session_id": event.session_id,
        "seq": event.seq,
        "parent_seq": event.parent_seq,
        "incarnation": event.incarnation,
        "wall_ns": event.wall_ns,
        "kind": event.kind.value,
        "call_id": event.call_id,
        "data": encode_json(dict(event.data)),
        "refs": encode_json(event.refs),
        "prev_hash": event.prev_hash,
        "hash": event.hash,
    }


def _head_moved(session_id: SessionId) -> Conflict:
    return Conflict("head_moved", f"cannot append to session {session_id}: its head moved meanwhile")
