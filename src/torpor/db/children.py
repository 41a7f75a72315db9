"""Sessions that an agent began: the rows that bind a child to its parent, and to the waitpoint that its end resolves.

The child's own row has the truth about its end; whoever waits for it looks there. So no other session's log is written
when a child ends: its owner has no right to that. It may only have a parent that sleeps run again.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torpor.core.errors import Conflict
from torpor.core.ids import SessionId, WaitpointId
from torpor.core.session import ENDED
from torpor.core.waitpoint import Waitpoint, WaitpointKind
from torpor.db import sessions, waitpoints
from torpor.db.database import Row, Transaction
from torpor.db.fence import refusal
from torpor.db.sessions import Session


class OnCancel(StrEnum):
    """What becomes of a child whose parent is cancelled."""

    CANCEL = "cancel"
    DETACH = "detach"
    """It goes on by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A child as its parent sees it."""

    session: Session
    on_cancel: OnCancel

    @property
    def has_ended(self) -> bool:
        return self.session.status in ENDED


def add(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    child_id: SessionId,
    waitpoint_id: WaitpointId,
    on_cancel: OnCancel,
) -> None:
    """Bind a session that is there, and that nobody has run, to its parent, and have a node run it."""
    owner: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token}
    bound = {"child_id": child_id, "waitpoint_id": waitpoint_id, "on_cancel": on_cancel.value}
    if not tx.run("child/insert_fenced", **owner, **bound) or not tx.run(
        "child/begin_fenced", **owner, child_id=child_id
    ):
        otherwise = Conflict("child_not_new", f"cannot begin session {child_id} as a child: it has been run")
        raise refusal(tx, session_id, owner_token, otherwise)


def of_waitpoint(tx: Transaction, point: Waitpoint) -> Child | None:
    """The child whose end resolves it; None: it resolves by other means, or the child was forgotten.

    A fork of a parent waits for the parent's child, which stays the parent's.
    """
    if point.kind is not WaitpointKind.CHILD:
        return None
    row = tx.one("child/find_of_waitpoint", child_id=point.data["child"])
    return None if row is None else _child_of(row)


def list_of(tx: Transaction, session_id: SessionId) -> list[Child]:
    """The children of a session, oldest first."""
    return [_child_of(row) for row in tx.all("child/list_of_parent", session_id=session_id)]


def parent_of(tx: Transaction, session_id: SessionId) -> SessionId | None:
    row = tx.one("child/find_parent", session_id=session_id)
    return None if row is None else SessionId(row["parent_id"])


def has_ended(tx: Transaction, point: Waitpoint) -> bool:
    """Whether an open waitpoint is to be resolved: its child has ended, or is gone."""
    if point.kind is not WaitpointKind.CHILD or not point.is_open:
        return False
    child = of_waitpoint(tx, point)
    return child is None or child.has_ended


def settle(tx: Transaction, *, session_id: SessionId, owner_token: int, point: Waitpoint, wall_ns: int) -> Waitpoint:
    """The waitpoint, resolved if its child has ended. Commit it durably."""
    if not has_ended(tx, point):
        return point
    child = of_waitpoint(tx, point)
    outcome: dict[str, Any] = {"status": "forgotten", "exit_status": None}
    if child is not None:
        outcome = {"status": child.session.status.value, "exit_status": child.session.exit_status}
    owner: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token}
    waitpoints.resolve(tx, **owner, point=point, resolution=outcome, wall_ns=wall_ns)
    return waitpoints.find(tx, session_id, point.waitpoint_id) or point


def _child_of(row: Row) -> Child:
    return Child(session=sessions.session_of(row), on_cancel=OnCancel(row["on_cancel"]))
