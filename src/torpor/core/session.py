"""A session's status and the one table of what may follow what (DESIGN 7, RECOVERY 8).

Guards, SQL and the diagram in the docs read `TRANSITIONS`; nobody keeps a second copy.
"""

from collections.abc import Mapping
from enum import StrEnum

from torpor.core.errors import Conflict
from torpor.core.ids import SessionId


class SessionStatus(StrEnum):
    CREATED = "created"
    """Recorded; no sandbox yet."""
    RUNNING = "running"
    WAITING = "waiting"
    """Its agent waits at a waitpoint; the sandbox is there."""
    HIBERNATING = "hibernating"
    """Cut and paused; what arrives is only logged."""
    ASLEEP = "asleep"
    """Only the checkpoint is left."""
    WAKING = "waking"
    RECOVERING = "recovering"
    """Its node or sandbox died; the ladder is tried."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"
    """No rung of the ladder holds."""


_S = SessionStatus

TRANSITIONS: Mapping[SessionStatus, frozenset[SessionStatus]] = {
    # A fork begins asleep, at its parent's checkpoint.
    _S.CREATED: frozenset({_S.RUNNING, _S.RECOVERING, _S.ASLEEP, _S.FAILED, _S.CANCELLED}),
    _S.RUNNING: frozenset({_S.WAITING, _S.HIBERNATING, _S.RECOVERING, _S.SUCCEEDED, _S.FAILED, _S.CANCELLED}),
    _S.WAITING: frozenset({_S.RUNNING, _S.HIBERNATING, _S.RECOVERING, _S.SUCCEEDED, _S.FAILED, _S.CANCELLED}),
    # Something was resolved since the cut, so the sandbox goes on in place (RECOVERY 8).
    _S.HIBERNATING: frozenset({_S.ASLEEP, _S.RUNNING, _S.RECOVERING, _S.CANCELLED}),
    _S.ASLEEP: frozenset({_S.WAKING, _S.CANCELLED}),
    # A failed wake goes back to sleep and is tried again; a damaged snapshot goes down the ladder.
    _S.WAKING: frozenset({_S.RUNNING, _S.ASLEEP, _S.RECOVERING, _S.CANCELLED}),
    # A node that died between committing a hibernation and deleting the sandbox leaves a session that may sleep.
    _S.RECOVERING: frozenset({_S.RUNNING, _S.ASLEEP, _S.LOST, _S.FAILED, _S.CANCELLED}),
    # A person may mend the store and resume.
    _S.LOST: frozenset({_S.RECOVERING, _S.CANCELLED}),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}

ENDED = frozenset({_S.SUCCEEDED, _S.FAILED, _S.CANCELLED})
"""Nothing follows these."""

MAY_HOLD_SANDBOX = frozenset({_S.RUNNING, _S.WAITING, _S.HIBERNATING, _S.WAKING, _S.RECOVERING})
"""After a crash in one of these a sandbox may be found alive."""


def may_follow(present: SessionStatus, wanted: SessionStatus) -> bool:
    return wanted in TRANSITIONS[present]


def check_transition(session_id: SessionId, present: SessionStatus, wanted: SessionStatus) -> None:
    """Refuse what the table does not allow.

    Raises:
        Conflict: `wanted` does not follow `present`.
    """
    if not may_follow(present, wanted):
        raise Conflict(
            "session_transition_refused",
            f"cannot move session {session_id} to {wanted}: it is {present}",
            hint=f"After {present} may come: {', '.join(sorted(TRANSITIONS[present])) or 'nothing'}.",
        )


def diagram() -> str:
    """The table as a Mermaid state diagram, for the docs."""
    edges = [f"    {one} --> {other}" for one, others in TRANSITIONS.items() for other in sorted(others)]
    ends = [f"    {status} --> [*]" for status in sorted(ENDED)]
    return "\n".join(["stateDiagram-v2", "    [*] --> created", *edges, *ends])
