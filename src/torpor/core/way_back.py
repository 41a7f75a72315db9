"""How far back a crash would take a session now: to which checkpoint, and what the log would answer again. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torpor.core.branch import Timeline
from torpor.core.call import Call
from torpor.core.checkpoint import Checkpoint, PumpAlive, restore_order
from torpor.core.ids import CallId
from torpor.core.redo import redo_set_after_recovery


@dataclass(frozen=True, slots=True, kw_only=True)
class WayBack:
    """What would happen if the sandbox died now.

    Attributes:
        checkpoint: the one that would be restored first.
        turns: model calls that the agent has begun since its cut, and would begin again.
        calls_from_log: calls, open at the cut or made since, whose whole answer is in the log: nobody is asked again.
    """

    checkpoint: Checkpoint
    turns: int
    calls_from_log: int


def way_back(checkpoints: Sequence[Checkpoint], calls: Mapping[CallId, Call], pump_alive: PumpAlive) -> WayBack | None:
    """None without a checkpoint."""
    order = restore_order(checkpoints, calls, pump_alive)
    if not order:
        return None
    redo = redo_set_after_recovery(calls.values(), order[0], Timeline())
    wanted = {*redo.pending, *redo.attached}
    return WayBack(
        checkpoint=order[0],
        turns=sum(call.is_llm and call.intended_seq > order[0].seq for call in calls.values()),
        calls_from_log=sum(calls[call_id].answered for call_id in wanted),
    )
