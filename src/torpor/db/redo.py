"""The redo set that an incarnation began with, as recovery decided it, and which of it was consumed since.

The rules are core.redo's. What this adds is that the decision survives a crash of the node that made it, and that an
entry is consumed at most once in its incarnation, whoever asks.
"""

from dataclasses import dataclass

from torpor.core.errors import Conflict
from torpor.core.ids import CallId, SessionId
from torpor.core.redo import RedoSet
from torpor.db.database import Transaction
from torpor.db.fence import held_row, refusal

PENDING, JOINABLE, ATTACHED = "pending", "joinable", "attached"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRedo:
    """The calls of one incarnation's first redo set by their part in it; `consumed` of them were taken since."""

    pending: tuple[CallId, ...]
    joinable: tuple[CallId, ...]
    attached: tuple[CallId, ...]
    consumed: frozenset[CallId]


def store(tx: Transaction, *, session_id: SessionId, owner_token: int, incarnation: int, redo: RedoSet) -> None:
    """Record the redo set with which an incarnation begins, once.

    Raises:
        Conflict: `row_conflict`, it has one; `redo_refused`, an entry is not a call of this session.
    """
    held_row(tx, session_id, owner_token)
    roles = ((PENDING, redo.pending), (JOINABLE, redo.joinable), (ATTACHED, sorted(redo.attached)))
    entries = [(role, call_id) for role, call_ids in roles for call_id in call_ids]
    for position, (role, call_id) in enumerate(entries):
        if not tx.run(
            "redo/insert_fenced",
            session_id=session_id,
            owner_token=owner_token,
            incarnation=incarnation,
            position=position,
            call_id=call_id,
            role=role,
        ):
            raise refusal(tx, session_id, owner_token, _refused(call_id, "it is no call of this session"))


def load(tx: Transaction, session_id: SessionId, incarnation: int) -> StoredRedo:
    rows = tx.all("redo/list_of_incarnation", session_id=session_id, incarnation=incarnation)

    def of_role(role: str) -> tuple[CallId, ...]:
        return tuple(CallId(row["call_id"]) for row in rows if row["role"] == role)

    return StoredRedo(
        pending=of_role(PENDING),
        joinable=of_role(JOINABLE),
        attached=of_role(ATTACHED),
        consumed=frozenset(CallId(row["call_id"]) for row in rows if row["consumed_seq"] is not None),
    )


def consume(tx: Transaction, *, session_id: SessionId, owner_token: int, incarnation: int, call_id: CallId) -> None:
    """Take an entry: from here on it answers no other request of this incarnation.

    Raises:
        Conflict: `redo_refused`, it was consumed, it is not in the set, or the incarnation is over.
    """
    if not tx.run(
        "redo/consume_fenced",
        session_id=session_id,
        owner_token=owner_token,
        incarnation=incarnation,
        call_id=call_id,
    ):
        raise refusal(tx, session_id, owner_token, _refused(call_id, f"incarnation {incarnation} has it no more"))


def _refused(call_id: CallId, reason: str) -> Conflict:
    return Conflict("redo_refused", f"cannot redo call {call_id}: {reason}")
