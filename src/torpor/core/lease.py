"""Who may drive a session (RECOVERY 9): the rules over a lease row and an flock, without touching either.

On one machine the flock is the truth and the row is its label: there is no TTL and no wall clock. Every acquisition,
adoption included, raises `owner_token`, and every append, commit and call start checks it in its own statement.
"""

from dataclasses import dataclass
from enum import StrEnum

from torpor.core.errors import Superseded
from torpor.core.ids import NodeId, SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The last node that acquired a session, and where it ran."""

    session_id: SessionId
    owner_token: int
    node_id: NodeId
    boot_id: str
    pid: int


class TakeOver(StrEnum):
    """What a node that wants a session has to do."""

    ACQUIRE = "acquire"
    """It holds the flock: raise the token, then open the FIFOs."""
    KILL_FIRST = "kill_first"
    """The owner lives but is silent: SIGKILL through its pidfd, wait for the flock, and ask again."""
    REFUSE = "refuse"
    """Another node drives it, or is about to."""


def take_over(lease: Lease | None, *, boot_id: str, got_flock: bool, owner_answers: bool) -> TakeOver:
    """Decide by the flock first: whoever holds it alone may acquire, whatever the row says.

    A row of another boot names a dead process, so a held flock then belongs to a node that has not written its own row
    yet: it must not be killed by the pid that stands in the row.
    """
    if got_flock:
        return TakeOver.ACQUIRE
    if lease is None or lease.boot_id != boot_id or owner_answers:
        return TakeOver.REFUSE
    return TakeOver.KILL_FIRST


def next_owner_token(lease: Lease | None) -> int:
    """The token of the next acquisition; tokens start at 1."""
    return 1 if lease is None else lease.owner_token + 1


def check_owner_token(session_id: SessionId, *, presented: int, current: int) -> None:
    """Refuse a write of a node that lost the session. The database says the same with "no row".

    Raises:
        Superseded: `presented` is not the current token.
    """
    if presented != current:
        raise Superseded(
            "owner_superseded",
            f"cannot write to session {session_id}: owner token {presented} was superseded by {current}",
            hint="Another node drives this session now.",
        )
