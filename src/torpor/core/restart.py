"""What becomes of an agent that failed: whether it begins again, from where, and what is forgotten of its last turn.

Pure. An agent that exits with something else than 0 is taken back to before its *failing turn*, which began with its
last model call: the model is asked anew, and only that. What the agent did before that turn is answered from the log;
what it did in the turn besides asking a model (a message out, a question, a note) is not expected again, but an equal
request gets the answer that is there. Cuts of the failing turn restore no more, nor do its model calls answer.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torpor.core.branch import Timeline
from torpor.core.call import Call, CallState
from torpor.core.checkpoint import Checkpoint
from torpor.core.errors import InvalidInput
from torpor.core.redo import RedoSet, entry_of, redo_set_after_recovery

RESTARTS_DEFAULT = 3
TURNS_OF_PROGRESS = 2
"""The failing turn done again, and the next one begun: what fails then is something else."""
ASKED_TO_END = frozenset({129, 130, 143})
"""SIGHUP, SIGINT, SIGTERM: somebody wanted the agent to end, which is no failure."""


def parse_restart(text: str) -> int:
    """How often an agent may be begun again in a row: `no`, `on-failure` or `on-failure:N`.

    Raises:
        InvalidInput: `restart_malformed`.
    """
    word, colon, number = text.partition(":")
    if text == "no":
        return 0
    if word == "on-failure" and (not colon or (number.isascii() and number.isdigit() and len(number) <= 6)):
        return int(number) if colon else RESTARTS_DEFAULT
    raise InvalidInput(
        "restart_malformed", f"cannot read --restart {text!r}", hint="Say `no`, `on-failure` or `on-failure:3`."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """One event of the log.

    Attributes:
        incarnation: the life whose agent failed.
        failed_seq: the first event of the failing turn; the event's own `seq` if there was no model call.
    """

    incarnation: int
    seq: int
    failed_seq: int

    def undoes(self, seq: int) -> bool:
        """Whether this event lies in the turn that failed."""
        return self.failed_seq <= seq < self.seq


def is_undone(restarts: Iterable[Restart], seq: int) -> bool:
    return any(restart.undoes(seq) for restart in restarts)


def still_restore(checkpoints: Iterable[Checkpoint], restarts: Collection[Restart]) -> list[Checkpoint]:
    """Those that were not cut in a turn that failed."""
    return [point for point in checkpoints if not is_undone(restarts, point.seq)]


def failing_turn(calls: Iterable[Call], restarts: Collection[Restart]) -> int | None:
    """The seq of the last model call that counts; None: there was none."""
    asked = (call.intended_seq for call in calls if call.is_llm and not is_undone(restarts, call.intended_seq))
    return max(asked, default=None)


def restarts_in_a_row(calls: Collection[Call], restarts: Sequence[Restart]) -> int:
    """How many of the last restarts brought the agent no further than to the turn in which it had failed."""
    end, count = None, 0
    for restart in reversed(restarts):
        turns = sum(
            call.is_llm and call.intended_seq > restart.seq and (end is None or call.intended_seq < end)
            for call in calls
        )
        if turns >= TURNS_OF_PROGRESS:
            break
        end, count = restart.seq, count + 1
    return count


def why_not(exit_status: int, restarts_max: int, calls: Collection[Call], restarts: Sequence[Restart]) -> str | None:
    """Why an agent that exited so does not begin again; None: it does. Empty: nobody expects it to."""
    if exit_status == 0 or restarts_max == 0:
        return ""
    if exit_status in ASKED_TO_END:
        return "it was asked to end"
    made = restarts_in_a_row(calls, restarts)
    return f"it failed again after {made} restarts" if made >= restarts_max else None


def redo_set_after_restarts(
    calls: Collection[Call], checkpoint: Checkpoint, restarts: Collection[Restart], timeline: Timeline
) -> RedoSet:
    """As `redo_set_after_recovery`, without what failed."""
    undone = [call for call in calls if is_undone(restarts, call.intended_seq)]
    redo = redo_set_after_recovery([call for call in calls if call not in undone], checkpoint, timeline)
    for call in undone:
        if not call.is_llm and call.state is not CallState.FAILED and call.intended_seq > checkpoint.seq:
            redo.offer(entry_of(call))
    return redo
