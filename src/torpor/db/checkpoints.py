"""Checkpoint rows. Committing one is the last step of a save: row, event and head land in the caller's transaction."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from torpor.core.checkpoint import Checkpoint, OpenStream
from torpor.core.errors import Conflict, NotFound
from torpor.core.events import EventDraft, Kind
from torpor.core.ids import CallId, CheckpointId, SessionId
from torpor.db.database import Row, Transaction
from torpor.db.encoding import decode_json, encode_json
from torpor.db.fence import held_row, refusal
from torpor.db.log import append

_JSON_FIELDS = ("open_streams", "pending_redo", "joinable")
_FIELDS = tuple(field.name for field in fields(Checkpoint))


def commit(
    tx: Transaction, *, session_id: SessionId, owner_token: int, checkpoint: Checkpoint, wall_ns: int
) -> Checkpoint:
    """Make a point that restores, with its checkpoint.committed event, whose seq is the `committed_seq` returned.

    Commit it durably.

    Raises:
        Conflict: `checkpoint_refused`, its cut is not in the log's past or its number is not new.
    """
    draft = EventDraft(kind=Kind.CHECKPOINT_COMMITTED, incarnation=checkpoint.incarnation, data=commit_data(checkpoint))
    event = append(tx, session_id=session_id, owner_token=owner_token, drafts=[draft], wall_ns=wall_ns)[0]
    committed = replace(checkpoint, session_id=session_id, committed_seq=event.seq)
    insert(tx, session_id=session_id, owner_token=owner_token, checkpoint=committed)
    return committed


def insert(tx: Transaction, *, session_id: SessionId, owner_token: int, checkpoint: Checkpoint) -> None:
    """Write a checkpoint's row, of which the log already speaks.

    Raises:
        Conflict: `checkpoint_refused`, as `commit`.
    """
    columns = {**asdict(checkpoint), "session_id": session_id, "has_memory": int(checkpoint.has_memory)}
    columns.update({name: encode_json(columns[name]) for name in _JSON_FIELDS})
    if not tx.run("checkpoint/insert_fenced", owner_token=owner_token, **columns):
        otherwise = Conflict(
            "checkpoint_refused",
            f"cannot commit checkpoint {checkpoint.checkpoint_id}: its cut is not in the past or its number is not new",
        )
        raise refusal(tx, session_id, owner_token, otherwise)


def commit_data(checkpoint: Checkpoint) -> dict[str, object]:
    """What checkpoint.committed says of a checkpoint: its row's digest covers what restoring goes by."""
    return {
        "checkpoint": checkpoint.checkpoint_id,
        "number": checkpoint.number,
        "seq": checkpoint.seq,
        "snapshot": checkpoint.snapshot_id,
        "manifest_digest": checkpoint.manifest_digest,
        "has_memory": checkpoint.has_memory,
        "reason": checkpoint.reason,
        "row_digest": _row_digest(checkpoint),
        "freeze_ns": checkpoint.freeze_ns,
        "stored_bytes": checkpoint.stored_bytes,
    }


def move_data(checkpoint: Checkpoint) -> dict[str, object]:
    """What checkpoint.repacked says: which parts of `commit_data` are as follows from now on."""
    data = commit_data(checkpoint)
    return {name: data[name] for name in ("checkpoint", "number", "snapshot", "manifest_digest", "row_digest")}


def get(tx: Transaction, checkpoint_id: CheckpointId) -> Checkpoint:
    """Raises:
    NotFound: there is none with this id.
    """
    row = tx.one("checkpoint/find_by_id", checkpoint_id=checkpoint_id)
    if row is None:
        raise _not_found(checkpoint_id)
    return _checkpoint_of(row)


def list_intact(tx: Transaction, session_id: SessionId, *, branches: bool = False) -> list[Checkpoint]:
    """The checkpoints that are not known to be damaged, oldest first; `core.checkpoint.restore_order` ranks them.

    Args:
        branches: also those that a rewind left, to which no recovery goes back.
    """
    return [
        _checkpoint_of(row)
        for row in _rows(tx, session_id)
        if row["damage"] is None and (branches or row["left_seq"] is None)
    ]


def list_left(tx: Transaction, session_id: SessionId) -> dict[int, int]:
    """By number, the checkpoints that rewinds left, each with the seq of its rewind."""
    return {row["number"]: row["left_seq"] for row in _rows(tx, session_id) if row["left_seq"] is not None}


def leave(tx: Transaction, *, session_id: SessionId, owner_token: int, point: Checkpoint, left_seq: int) -> None:
    """Let recovery never go to what was cut after `point`, which a rewind logged at `left_seq` leaves."""
    key = {"session_id": session_id, "owner_token": owner_token}
    tx.run("checkpoint/leave_fenced", **key, seq=point.seq, number=point.number, left_seq=left_seq)
    held_row(tx, session_id, owner_token)


def newest(tx: Transaction, session_id: SessionId) -> Checkpoint | None:
    """The intact checkpoint with the highest number."""
    row = tx.one("checkpoint/find_newest", session_id=session_id)
    return None if row is None else _checkpoint_of(row)


def numbered(tx: Transaction, session_id: SessionId, number: int) -> Checkpoint | None:
    """A checkpoint by its number, damaged or not."""
    row = tx.one("checkpoint/find_by_number", session_id=session_id, number=number)
    return None if row is None else _checkpoint_of(row)


def list_damaged(tx: Transaction, session_id: SessionId) -> dict[CheckpointId, str]:
    """Why checkpoints do not restore."""
    return {CheckpointId(row["checkpoint_id"]): row["damage"] for row in _rows(tx, session_id) if row["damage"]}


def mark_damaged(
    tx: Transaction, *, session_id: SessionId, owner_token: int, checkpoint_id: CheckpointId, damage: str
) -> None:
    """Remember why a checkpoint does not restore; it stays, for a person may mend its snapshot."""
    changed = tx.run(
        "checkpoint/mark_damaged_fenced",
        session_id=session_id,
        owner_token=owner_token,
        checkpoint_id=checkpoint_id,
        damage=damage,
    )
    if not changed:
        raise refusal(tx, session_id, owner_token, _not_found(checkpoint_id))


def forget(tx: Transaction, *, session_id: SessionId, owner_token: int, checkpoint_id: CheckpointId) -> None:
    """Drop a checkpoint's row, which is what keeps its snapshot; its event stays."""
    if not tx.run(
        "checkpoint/delete_fenced", session_id=session_id, owner_token=owner_token, checkpoint_id=checkpoint_id
    ):
        raise refusal(tx, session_id, owner_token, _not_found(checkpoint_id))


def _rows(tx: Transaction, session_id: SessionId) -> list[Row]:
    return tx.all("checkpoint/list_of_session", session_id=session_id)


def _row_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 (hex) over all of a checkpoint but the seq that its commit gives it."""
    return hashlib.sha256(encode_json(asdict(replace(checkpoint, committed_seq=0))).encode()).hexdigest()


def as_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as `of_json` reads it."""
    return asdict(checkpoint)


def of_json(values: Mapping[str, Any]) -> Checkpoint:
    """Raises KeyError, TypeError: it is no checkpoint that this version knows."""
    fields_of: dict[str, Any] = {name: values[name] for name in _FIELDS}
    fields_of["has_memory"] = bool(values["has_memory"])
    fields_of["open_streams"] = tuple(OpenStream(**stream) for stream in values["open_streams"])
    fields_of["pending_redo"] = tuple(map(CallId, values["pending_redo"]))
    fields_of["joinable"] = tuple(map(CallId, values["joinable"]))
    return Checkpoint(**fields_of)


def _checkpoint_of(row: Row) -> Checkpoint:
    values = {name: row[name] for name in _FIELDS}
    return of_json({**values, **{name: decode_json(row[name]) for name in _JSON_FIELDS}})


def _not_found(checkpoint_id: CheckpointId) -> NotFound:
    return NotFound("checkpoint_not_found", f"cannot find checkpoint {checkpoint_id}: there is none")
