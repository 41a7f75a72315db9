"""What happens when a restored agent makes a call that is not in the log while others are awaited (RECOVERY 5.3)."""

from collections.abc import Sequence
from enum import StrEnum


class OnDivergence(StrEnum):
    """A session's policy."""

    CONTINUE = "continue"
    """The log branches; the calls of the path that was left are shown."""
    ASK = "ask"
    """The call is held until a person lets it go on."""
    FAIL = "fail"
    """The call is not made, and the session ends as failed."""
    TELL = "tell"
    """As `continue`, and the next request to a model gets a note: the only bytes of an agent's that Torpor changes."""

    @property
    def holds(self) -> bool:
        """Whether the call waits for what becomes of the session."""
        return self in {OnDivergence.ASK, OnDivergence.FAIL}


def note_to_agent(orphaned: Sequence[str]) -> str:
    """What `tell` says: `orphaned` are the effects of the path that was left, as method and target."""
    done = "; ".join(orphaned) if orphaned else "none that changed anything outside"
    return (
        "Note from Torpor, which runs this session: it was restored from a checkpoint, and you have now taken another "
        f"path than before the restore. What you had asked for on the path that you left, and may not know of: {done}."
    )
