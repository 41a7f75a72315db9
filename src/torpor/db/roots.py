"""Checkpoint rows as roots of the snapshot store: which there are, forgetting them, pinning them, moving them.

A row keeps its snapshot; whatever no row names is garbage. So deleting a row is the first step of freeing anything, and
a collector syncs the database before it takes the second (docs/collecting.md).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torpor.core.checkpoint import Checkpoint, sure_to_restore
from torpor.core.errors import NotFound
from torpor.core.events import EventDraft, Kind
from torpor.core.ids import CheckpointId, SessionId, SnapshotId
from torpor.core.retention import RetentionPlan, RetentionPoint, RetentionPolicy, plan_retention
from torpor.db import calls, checkpoints
from torpor.db.database import Row, Transaction
from torpor.db.fence import held_row, refusal
from torpor.db.log import append
from torpor.db.sessions import get


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """One checkpoint row, as the store sees it.

    Attributes:
        manifest_digest: hexadecimal.
        damage: why it is known not to restore; None when it is believed to.
    """

    session_id: SessionId
    number: int
    checkpoint_id: CheckpointId
    snapshot_id: SnapshotId
    manifest_digest: str
    damage: str | None

    def __str__(self) -> str:
        return f"checkpoint {self.number} of session {self.session_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A checkpoint that is to name another snapshot with the same contents; `seen_id` is the one that it names now."""

    checkpoint_id: CheckpointId
    seen_id: SnapshotId
    snapshot_id: SnapshotId
    manifest_digest: str


def list_roots(tx: Transaction) -> list[Root]:
    """Every checkpoint of every session, damaged ones too: somebody may mend them."""
    return [
        Root(
            session_id=SessionId(row["session_id"]),
            number=row["number"],
            checkpoint_id=CheckpointId(row["checkpoint_id"]),
            snapshot_id=SnapshotId(row["snapshot_id"]),
            manifest_digest=row["manifest_digest"],
            damage=row["damage"],
        )
        for row in tx.all("checkpoint/list_roots")
    ]


def plan(
    tx: Transaction, session_id: SessionId, policy: RetentionPolicy, *, in_use: Collection[SnapshotId] = ()
) -> RetentionPlan:
    """What retention keeps of a session, and what it would forget.

    Args:
        in_use: snapshots that a living sandbox came from.
    """
    return _plan(tx, session_id, policy, tx.all("checkpoint/list_points", session_id=session_id), in_use)


def retain(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    policy: RetentionPolicy,
    wall_ns: int,
    in_use: Collection[SnapshotId] = (),
    at_least: int = 1,
) -> tuple[int, ...]:
    """Forget what retention does not keep, and give the numbers; nothing while there are fewer than `at_least`."""
    held_row(tx, session_id, owner_token)
    rows = tx.all("checkpoint/list_points", session_id=session_id)
    forgotten = _plan(tx, session_id, policy, rows, in_use).forgotten
    if len(forgotten) < at_least:
        return ()
    ids = {row["number"]: CheckpointId(row["checkpoint_id"]) for row in rows}
    going = {number: ids[number] for number in forgotten}
    _forget(tx, session_id, owner_token, going, reason="retention", wall_ns=wall_ns)
    return forgotten


def forget_damaged(
    tx: Transaction, *, session_id: SessionId, owner_token: int, roots: Iterable[Root], wall_ns: int
) -> None:
    """Give up on checkpoints of one session that do not restore."""
    going = {root.number: root.checkpoint_id for root in roots}
    _forget(tx, session_id, owner_token, going, reason="damaged", wall_ns=wall_ns)


def pin(
    tx: Transaction, *, session_id: SessionId, owner_token: int, number: int, is_pinned: bool, wall_ns: int
) -> None:
    """Keep a checkpoint whatever retention says, or leave it to retention again.

    Raises:
        NotFound: `checkpoint_not_found`.
    """
    fields = {"session_id": session_id, "owner_token": owner_token}
    if not tx.run("checkpoint/pin_fenced", **fields, number=number, pinned=int(is_pinned)):
        otherwise = NotFound(
            "checkpoint_not_found",
            f"cannot pin checkpoint {number} of session {session_id}: there is none",
            hint=f"`torpor checkpoints {session_id}` lists them.",
        )
        raise refusal(tx, session_id, owner_token, otherwise)
    data = {"number": number, "pinned": is_pinned}
    _note(tx, session_id, owner_token, [(Kind.CHECKPOINT_PINNED, data)], wall_ns)


def move(
    tx: Transaction, *, session_id: SessionId, owner_token: int, moves: Sequence[Move], wall_ns: int
) -> list[Checkpoint]:
    """Let checkpoints name their repacked snapshots; leaves out those that name another one by now, or are gone."""
    held_row(tx, session_id, owner_token)  # That no row fits says nothing of the token here.
    moved: list[Checkpoint] = []
    for one in moves:
        changed = tx.run(
            "checkpoint/move_fenced",
            session_id=session_id,
            owner_token=owner_token,
            checkpoint_id=one.checkpoint_id,
            seen_snapshot_id=one.seen_id,
            snapshot_id=one.snapshot_id,
            manifest_digest=one.manifest_digest,
        )
        if changed:
            moved.append(checkpoints.get(tx, one.checkpoint_id))
    events = [(Kind.CHECKPOINT_REPACKED, checkpoints.move_data(point)) for point in moved]
    _note(tx, session_id, owner_token, events, wall_ns)
    return moved


def bring(tx: Transaction, *, session_id: SessionId, owner_token: int, checkpoint: Checkpoint, wall_ns: int) -> None:
    """Give a session that was imported a checkpoint that its log knows, whose snapshot has another name here."""
    checkpoints.insert(tx, session_id=session_id, owner_token=owner_token, checkpoint=checkpoint)
    event = (Kind.CHECKPOINT_REPACKED, checkpoints.move_data(checkpoint))
    _note(tx, session_id, owner_token, [event], wall_ns)


def _plan(
    tx: Transaction,
    session_id: SessionId,
    policy: RetentionPolicy,
    rows: Sequence[Row],
    in_use: Collection[SnapshotId],
) -> RetentionPlan:
    points = [
        RetentionPoint(number=row["number"], wall_ns=row["wall_ns"], damaged=row["damage"] is not None) for row in rows
    ]
    fixed = {
        "pinned": {row["number"] for row in rows if row["pinned"]},
        "forked": {row["number"] for row in rows if row["others"]},
        "in_use": {row["number"] for row in rows if row["snapshot_id"] in in_use},
    }
    first = plan_retention(points, policy, **fixed)
    if not first.forgotten:
        return first
    # Only now is it worth to look at the calls that were open at each cut.
    fixed["in_use"] |= _newest_sure(
        tx, session_id, [row["number"] for row in rows if row["damage"] is None and row["left_seq"] is None]
    )
    return plan_retention(points, policy, **fixed)


def _newest_sure(tx: Transaction, session_id: SessionId, numbers: Sequence[int]) -> set[int]:
    for number in reversed(numbers):
        point = checkpoints.numbered(tx, session_id, number)
        if point is not None:
            opened = {stream.call_id for stream in point.open_streams if stream.call_id is not None}
            if sure_to_restore(point, {call_id: calls.load_call(tx, call_id) for call_id in opened}):
                return {number}
    return set()


def _forget(
    tx: Transaction,
    session_id: SessionId,
    owner_token: int,
    going: dict[int, CheckpointId],
    *,
    reason: str,
    wall_ns: int,
) -> None:
    for checkpoint_id in going.values():
        checkpoints.forget(tx, session_id=session_id, owner_token=owner_token, checkpoint_id=checkpoint_id)
    data = {"numbers": sorted(going), "reason": reason}
    _note(tx, session_id, owner_token, [(Kind.CHECKPOINT_FORGOTTEN, data)], wall_ns)


def _note(
    tx: Transaction,
    session_id: SessionId,
    owner_token: int,
    events: Sequence[tuple[Kind, Mapping[str, Any]]],
    wall_ns: int,
) -> None:
    incarnation = get(tx, session_id).incarnation
    drafts = [EventDraft(kind=kind, incarnation=incarnation, data=data) for kind, data in events]
    if drafts:
        append(tx, session_id=session_id, owner_token=owner_token, drafts=drafts, wall_ns=wall_ns)
