"""Rows of waitpoints, each with its event in the same transaction; the session's status follows them.

A session that runs is `waiting` from the waitpoint on that somebody has to resolve, and runs again from the resolution
on. A session that does not run (asleep, recovering) keeps its status: what it waits on is found when it runs again.
"""

from collections.abc import Mapping
from typing import Any

from torpor.core.events import EventDraft, Kind
from torpor.core.ids import CallId, SessionId, WaitpointId, new_waitpoint_id
from torpor.core.session import SessionStatus
from torpor.core.waitpoint import Waitpoint, WaitpointKind
from torpor.db import sessions
from torpor.db.database import Row, Transaction
from torpor.db.encoding import decode_json, encode_json
from torpor.db.fence import held_row, refusal
from torpor.db.log import append


def wait_on(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    kind: WaitpointKind,
    call_id: CallId | None,
    data: Mapping[str, Any],
    wall_ns: int,
) -> None:
    """Let the session wait, on the waitpoint that this call has already if it is open. Commit it durably."""
    waiting = [point for point in open_waitpoints(tx, session_id) if point.call_id == call_id and point.kind is kind]
    if not waiting:
        _create(tx, session_id, owner_token, kind, call_id, data, wall_ns)
    _move(tx, session_id, owner_token, SessionStatus.RUNNING, SessionStatus.WAITING, f"it waits: {kind}", wall_ns)


def resolve_all(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    kind: WaitpointKind,
    resolution: Mapping[str, Any],
    wall_ns: int,
) -> list[Waitpoint]:
    """Resolve every open waitpoint of a kind; who waited on them looks again. Commit it durably."""
    held_row(tx, session_id, owner_token)
    points = [point for point in open_waitpoints(tx, session_id) if point.kind is kind]
    for point in points:
        tx.run(
            "waitpoint/resolve_fenced",
            session_id=session_id,
            owner_token=owner_token,
            waitpoint_id=point.waitpoint_id,
            resolution=encode_json(dict(resolution)),
            wall_ns=wall_ns,
        )
        data = {"waitpoint": point.waitpoint_id, "kind": kind.value, **resolution}
        _note(tx, session_id, owner_token, Kind.WAITPOINT_RESOLVED, point.call_id, data, wall_ns)
    if not open_waitpoints(tx, session_id):
        _move(tx, session_id, owner_token, SessionStatus.WAITING, SessionStatus.RUNNING, f"resolved: {kind}", wall_ns)
    return points


def open_waitpoints(tx: Transaction, session_id: SessionId) -> list[Waitpoint]:
    """What a session waits on, oldest first."""
    rows = tx.all("waitpoint/list_of_session", session_id=session_id)
    return [point for point in map(_waitpoint_of, rows) if point.is_open]


def list_of_session(tx: Transaction, session_id: SessionId) -> list[Waitpoint]:
    return [_waitpoint_of(row) for row in tx.all("waitpoint/list_of_session", session_id=session_id)]


def _create(
    tx: Transaction,
    session_id: SessionId,
    owner_token: int,
    kind: WaitpointKind,
    call_id: CallId | None,
    data: Mapping[str, Any],
    wall_ns: int,
) -> None:
    waitpoint_id = new_waitpoint_id(wall_ns)
    if not tx.run(
        "waitpoint/insert_fenced",
        session_id=session_id,
        owner_token=owner_token,
        waitpoint_id=waitpoint_id,
        kind=kind.value,
        call_id=call_id,
        data=encode_json(dict(data)),
        created_ns=wall_ns,
    ):
        raise refusal(tx, session_id, owner_token, sessions.changed(session_id))
    event = {"waitpoint": waitpoint_id, "kind": kind.value, **data}
    _note(tx, session_id, owner_token, Kind.WAITPOINT_CREATED, call_id, event, wall_ns)


def _note(
    tx: Transaction,
    session_id: SessionId,
    owner_token: int,
    kind: Kind,
    call_id: CallId | None,
    data: Mapping[str, Any],
    wall_ns: int,
) -> None:
    incarnation = held_row(tx, session_id, owner_token)["incarnation"]
    draft = EventDraft(kind=kind, incarnation=incarnation, call_id=call_id, data=data)
    append(tx, session_id=session_id, owner_token=owner_token, drafts=[draft], wall_ns=wall_ns)


def _move(
    tx: Transaction,
    session_id: SessionId,
    owner_token: int,
    present: SessionStatus,
    wanted: SessionStatus,
    reason: str,
    wall_ns: int,
) -> None:
    """Change the status if it is `present`."""
    if sessions.get(tx, session_id).status is present:
        sessions.set_status(
            tx, session_id=session_id, owner_token=owner_token, status=wanted, wall_ns=wall_ns, reason=reason
        )


def _waitpoint_of(row: Row) -> Waitpoint:
    return Waitpoint(
        waitpoint_id=WaitpointId(row["waitpoint_id"]),
        session_id=SessionId(row["session_id"]),
        kind=WaitpointKind(row["kind"]),
        call_id=CallId(row["call_id"]) if row["call_id"] is not None else None,
        data=decode_json(row["data"]),
        created_ns=row["created_ns"],
        resolved_ns=row["resolved_ns"],
        resolution=None if row["resolution"] is None else decode_json(row["resolution"]),
    )
