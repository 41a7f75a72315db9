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
    owner: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token}
    waiting = [point for point in open_waitpoints(tx, session_id) if point.call_id == call_id and point.kind is kind]
    if not waiting:
        create(tx, **owner, kind=kind, call_id=call_id, data=data, wall_ns=wall_ns)
    wait(tx, **owner, kind=kind, wall_ns=wall_ns)


def create(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    kind: WaitpointKind,
    call_id: CallId | None,
    wall_ns: int,
    data: Mapping[str, Any] | None = None,
    due_ns: int | None = None,
    text: str | None = None,
    waitpoint_id: WaitpointId | None = None,
) -> Waitpoint:
    """Make a waitpoint, which nobody waits on yet. Commit it durably.

    Args:
        waitpoint_id: the id by which a fork's memory knows it; None: a new one.
        due_ns: wall time at which it resolves by itself.
        text: the digest, in hex, of the block with what somebody wrote for it; `data` names it as `text`.
    """
    owner: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token}
    waitpoint_id = waitpoint_id or new_waitpoint_id(wall_ns)
    refs = () if text is None else (text,)
    kept = {**(data or {}), **({"text": refs[0]} if refs else {})}
    if not tx.run(
        "waitpoint/insert_fenced",
        **owner,
        waitpoint_id=waitpoint_id,
        kind=kind.value,
        call_id=call_id,
        data=encode_json(kept),
        created_ns=wall_ns,
        due_ns=due_ns,
    ):
        raise refusal(tx, session_id, owner_token, sessions.changed(session_id))
    due = {} if due_ns is None else {"due_ns": due_ns}
    event = {"waitpoint": waitpoint_id, "kind": kind.value, **(data or {}), **due}
    _note(tx, owner, Kind.WAITPOINT_CREATED, call_id, event, refs, wall_ns)
    made = find(tx, session_id, waitpoint_id)
    assert made is not None
    return made


def wait(tx: Transaction, *, session_id: SessionId, owner_token: int, kind: WaitpointKind, wall_ns: int) -> None:
    """A session that runs waits from now on."""
    held_row(tx, session_id, owner_token)
    _move(tx, session_id, owner_token, SessionStatus.RUNNING, SessionStatus.WAITING, f"it waits: {kind}", wall_ns)


def resolve(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    point: Waitpoint,
    resolution: Mapping[str, Any],
    wall_ns: int,
    text: str | None = None,
) -> bool:
    """Resolve a waitpoint; False if it was resolved before. Commit it durably.

    Args:
        text: the digest, in hex, of the block with what somebody wrote; the resolution names it as `text`.
    """
    owner: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token}
    refs = () if text is None else (text,)
    kept = {**resolution, **({"text": refs[0]} if refs else {})}
    if not tx.run(
        "waitpoint/resolve_fenced",
        **owner,
        waitpoint_id=point.waitpoint_id,
        resolution=encode_json(kept),
        wall_ns=wall_ns,
    ):
        held_row(tx, session_id, owner_token)
        return False
    data = {"waitpoint": point.waitpoint_id, "kind": point.kind.value, **resolution}
    _note(tx, owner, Kind.WAITPOINT_RESOLVED, point.call_id, data, refs, wall_ns)
    tx.run("session/wake_sleeper_fenced", **owner)
    if not open_waitpoints(tx, session_id):
        reason = f"resolved: {point.kind}"
        _move(tx, session_id, owner_token, SessionStatus.WAITING, SessionStatus.RUNNING, reason, wall_ns)
    return True


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
    owner: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token}
    held_row(tx, session_id, owner_token)
    points = [point for point in open_waitpoints(tx, session_id) if point.kind is kind]
    for point in points:
        resolve(tx, **owner, point=point, resolution=resolution, wall_ns=wall_ns)
    return points


def find(tx: Transaction, session_id: SessionId, waitpoint_id: WaitpointId) -> Waitpoint | None:
    row = tx.one("waitpoint/find_by_id", session_id=session_id, waitpoint_id=waitpoint_id)
    return None if row is None else _waitpoint_of(row)


def list_of_call(tx: Transaction, session_id: SessionId, call_id: CallId) -> list[Waitpoint]:
    """What a call made, or holds on to, oldest first."""
    return [_waitpoint_of(row) for row in tx.all("waitpoint/list_of_call", session_id=session_id, call_id=call_id)]


def list_open(tx: Transaction) -> list[Waitpoint]:
    """What all sessions that have not ended wait on, oldest first."""
    return [_waitpoint_of(row) for row in tx.all("waitpoint/list_open")]


def open_waitpoints(tx: Transaction, session_id: SessionId) -> list[Waitpoint]:
    """What a session waits on, oldest first."""
    return [_waitpoint_of(row) for row in tx.all("waitpoint/list_open_of_session", session_id=session_id)]


def list_of_session(tx: Transaction, session_id: SessionId) -> list[Waitpoint]:
    return [_waitpoint_of(row) for row in tx.all("waitpoint/list_of_session", session_id=session_id)]


def _note(
    tx: Transaction,
    owner: dict[str, Any],
    kind: Kind,
    call_id: CallId | None,
    data: Mapping[str, Any],
    refs: tuple[str, ...],
    wall_ns: int,
) -> None:
    incarnation = held_row(tx, owner["session_id"], owner["owner_token"])["incarnation"]
    draft = EventDraft(kind=kind, incarnation=incarnation, call_id=call_id, data=data, refs=refs)
    append(tx, **owner, drafts=[draft], wall_ns=wall_ns)


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
        due_ns=row["due_ns"],
        resolved_ns=row["resolved_ns"],
        resolution=None if row["resolution"] is None else decode_json(row["resolution"]),
    )
