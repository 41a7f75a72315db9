"""When a node is to run a session that none runs: its `wake_ns`, which changes together with what it follows from.

`None` leaves it to a person. A session that a node daemon runs is due all the time, so that the next daemon goes on
with it when this one dies.
"""

from typing import Any

from torpor.core.ids import SessionId
from torpor.core.session import SessionStatus
from torpor.db import sessions, waitpoints
from torpor.db.database import Transaction
from torpor.db.fence import held_row, refusal
from torpor.db.sessions import Session

NOW = 0
WHEN_RESOLVED = 2**63 - 1
"""No time comes to it: only what resolves one of its waitpoints wakes it."""


def fall_asleep(
    tx: Transaction, *, session_id: SessionId, owner_token: int, cut_seq: int, at_latest: int | None, wall_ns: int
) -> bool:
    """Let a session sleep that is cut and stands still; False: something that it may wait for came after the cut.

    It wakes when the first of its waitpoints is due, or when one is resolved. Commit it durably.

    Args:
        cut_seq: the log's head at the cut.
        at_latest: when it wakes whatever its waitpoints say; None: they alone do.
    """
    owner: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token}
    held_row(tx, session_id, owner_token)
    if tx.one("log/find_news_after", session_id=session_id, seq=cut_seq) is not None:
        return False
    points = waitpoints.open_waitpoints(tx, session_id)
    due = [WHEN_RESOLVED if point.due_ns is None else point.due_ns for point in points]
    reasons = [point.kind.value for point in points] or ["an answer"]
    sessions.set_status(
        tx, **owner, status=SessionStatus.ASLEEP, wall_ns=wall_ns, reason=f"it waits for: {', '.join(reasons)}"
    )
    set_wake(tx, **owner, wake_ns=min([*due, *([] if at_latest is None else [at_latest])], default=None))
    return True


def set_wake(tx: Transaction, *, session_id: SessionId, owner_token: int, wake_ns: int | None) -> None:
    """Say when a node is to run a session that none runs."""
    if not tx.run("session/set_wake_fenced", session_id=session_id, owner_token=owner_token, wake_ns=wake_ns):
        raise refusal(tx, session_id, owner_token, sessions.changed(session_id))


def list_due(tx: Transaction, wall_ns: int) -> list[Session]:
    """The sessions that a node is to run, whether one does or not; those that are due for longest come first."""
    return [sessions.session_of(row) for row in tx.all("session/list_due", wall_ns=wall_ns)]


def next_wake(tx: Transaction, wall_ns: int) -> tuple[int | None, int]:
    """When the next session comes to its time (None: none does), and how many are not left to a person."""
    row = tx.one("session/find_next_wake", wall_ns=wall_ns)
    assert row is not None
    return row["wake_ns"], row["sessions"]
