"""The rungs by which a session whose sandbox is gone comes back, best first (RECOVERY 4, DESIGN 7). Pure.

    restore   a checkpoint with its memory; those of which no open stream has to be reset first
    replay    a fresh boot with the files as they were given: the log answers all that was done since
    lost      a fresh boot with the newest files; nothing is expected of the agent, which is told

A session that never had a checkpoint with a memory has lost none: it is replayed. Of one that had, and whose memories
can all not be restored, the policy decides: to start a program anew in the middle of its task is not always wanted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from torpor.core.call import Call, CallState
from torpor.core.checkpoint import Checkpoint, PumpAlive, cut_order, restore_order
from torpor.core.ids import CallId
from torpor.core.redo import RedoSet, entry_of


class OnLost(StrEnum):
    """What happens when no memory of a session restores."""

    BOOT = "boot"
    """The program is started anew with the newest files, and told that its memory is lost."""
    REPLAY = "replay"
    """It is started anew with the files as they were given, and does all again, answered from the log."""
    FAIL = "fail"
    """The session is `lost`, until somebody mends its store."""


class Way(StrEnum):
    """How a rung brings the sandbox to life."""

    RESTORE = "restore"
    REPLAY = "replay"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One rung that may be tried."""

    way: Way
    checkpoint: Checkpoint

    @property
    def mode(self) -> str:
        """What events call it."""
        return "restore" if self.way is Way.RESTORE else "boot"


def ladder(
    checkpoints: Sequence[Checkpoint],
    calls: Mapping[CallId, Call],
    pump_alive: PumpAlive,
    *,
    on_lost: OnLost,
    had_memory: bool,
    give_up_memory: bool = False,
) -> list[Step]:
    """What is tried, in this order.

    Args:
        checkpoints: all that may restore.
        had_memory: memories were saved, but none of them is among `checkpoints`.
        give_up_memory: a person's word: no memory is restored, and `fail` is no answer.
    """
    order = restore_order(checkpoints, calls, pump_alive)
    memories = [Step(way=Way.RESTORE, checkpoint=point) for point in order if point.has_memory]
    given = [point for point in order if not point.has_memory] or _files_alone(checkpoints)
    replays = [Step(way=Way.REPLAY, checkpoint=point) for point in given]
    newest_first = sorted(checkpoints, key=cut_order, reverse=True)
    losses = [Step(way=Way.LOST, checkpoint=point) for point in newest_first]
    if not memories and not had_memory:
        return replays
    by_policy = {OnLost.BOOT: losses, OnLost.REPLAY: replays, OnLost.FAIL: losses if give_up_memory else []}
    return by_policy[on_lost] if give_up_memory else memories + by_policy[on_lost]


def _files_alone(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """What a session was given that began with a memory, a fork or an import, without that memory."""
    oldest = sorted(checkpoints, key=cut_order)[:1]
    return [replace(point, has_memory=False, open_streams=()) for point in oldest]


def redo_set_of_lost(calls: Iterable[Call]) -> RedoSet:
    """What may answer an agent without memory: what it had asked Torpor for and has no answer yet. None is expected."""
    waiting = (call for call in calls if not call.is_llm and call.state is CallState.INTENDED)
    return RedoSet(joinable=[entry_of(call) for call in waiting])
