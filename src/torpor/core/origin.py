"""Where a fork or a rewind begins, and what becomes of each call there (RECOVERY 5.1). Pure.

An `Origin` is a checkpoint and the end of the past: mostly the cut itself, or, for a turn without a checkpoint of its
own, the call before that turn, and then the calls between are answered from the log. A `Plan` says of every call that
the agent may still ask for whether its answer comes along.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torpor.core.branch import Timeline
from torpor.core.call import Call, CallState
from torpor.core.checkpoint import Checkpoint, OpenStream, cut_order
from torpor.core.ids import CallId


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A point of a session.

    Attributes:
        past_seq: events up to it are the past.
        turn: the call of the turn that was asked for, if its own request lies behind the past.
    """

    checkpoint: Checkpoint
    past_seq: int
    turn: CallId | None = None

    @property
    def at_cut(self) -> bool:
        return self.past_seq == self.checkpoint.seq


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What becomes of calls; all others are only memory.

    Attributes:
        kept: calls whose answers come along, each once, in the order in which they were made.
        anew: models that are asked anew: their streams have seen nothing of the answer.
        pending, joinable: those of `kept` that no stream holds, as a checkpoint lists them.
    """

    kept: tuple[CallId, ...]
    anew: tuple[CallId, ...]
    pending: tuple[CallId, ...]
    joinable: tuple[CallId, ...]


def at_checkpoint(checkpoint: Checkpoint) -> Origin:
    return Origin(checkpoint=checkpoint, past_seq=checkpoint.seq)


def at_turn(checkpoints: Iterable[Checkpoint], call: Call) -> Origin | None:
    """Where the agent has asked for `call` and seen nothing of the answer, by the newest cut that leads there."""
    for point in sorted(checkpoints, key=cut_order, reverse=True):
        if any(stream.call_id == call.call_id and not _touched(stream) for stream in point.open_streams):
            return at_checkpoint(point)
        if point.seq < call.intended_seq:
            return Origin(checkpoint=point, past_seq=call.intended_seq - 1, turn=call.call_id)
    return None


def plan(origin: Origin, calls: Mapping[CallId, Call], timeline: Timeline, *, resample: bool) -> Plan:
    """Args:
    calls: the session's.
    resample: models are asked anew where that is possible.
    """
    point = origin.checkpoint
    opened = [
        (stream, calls[stream.call_id])
        for stream in point.open_streams
        if stream.call_id is not None and stream.call_id in calls
    ]
    # On the way to a turn that lies behind the cut another answer would lead elsewhere.
    may_ask = resample and origin.turn is None
    anew = [call for stream, call in opened if may_ask and call.is_llm and not _touched(stream)]
    held = [call for _, call in opened if call not in anew]
    between = [
        call
        for call in calls.values()
        if timeline.after(point.seq, call.intended_seq) and call.intended_seq <= origin.past_seq
    ]
    # What models had answered before the cut is in the agent's memory, or was on its way back there after a restore.
    leads = origin.turn is not None or not resample
    awaited = [call for call in calls.values() if call.call_id in point.pending_redo and (leads or not call.is_llm)]
    pending = [*awaited, *between]
    joinable = [call for call in calls.values() if call.call_id in point.joinable and not call.is_llm]
    if origin.turn is not None and not resample:
        pending.append(calls[origin.turn])
    taken = {call.call_id for _, call in opened}
    alive = {call.call_id for call in calls.values() if call.state is not CallState.FAILED}
    waiting = _in_order(pending, alive - taken)
    offered = _in_order(joinable, alive - taken - {*waiting})
    kept = _in_order([*held, *pending, *joinable], {*waiting, *offered, *(call.call_id for call in held)})
    return Plan(kept=kept, anew=_in_order(anew, taken), pending=waiting, joinable=offered)


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """Where a session has been, by its rewinds.

    Attributes:
        replaced: calls that a rewind asked anew, each with the one that stands for it.
    """

    timeline: Timeline = field(default_factory=Timeline)
    replaced: Mapping[CallId, CallId] = field(default_factory=dict[CallId, CallId])

    def calls(self, calls: Mapping[CallId, Call]) -> list[Call]:
        """Those that may answer."""
        return [call for call in calls.values() if call.call_id not in self.replaced]

    def point(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint as it restores now: what was asked anew stands for what was open at its cut."""
        streams = tuple(
            replace(stream, call_id=self._present(stream.call_id), attempt=1)
            if stream.call_id in self.replaced
            else stream
            for stream in checkpoint.open_streams
        )
        return replace(checkpoint, open_streams=streams)

    def _present(self, call_id: CallId | None) -> CallId | None:
        while call_id is not None and call_id in self.replaced:
            call_id = self.replaced[call_id]
        return call_id


def undone(origin: Origin, calls: Iterable[Call], timeline: Timeline, kept: Collection[CallId]) -> list[Call]:
    """The calls that a rewind to `origin` leaves: made after it, and none of those whose answers come along."""
    return [
        call
        for call in calls
        if timeline.holds(call.intended_seq) and call.intended_seq > origin.past_seq and call.call_id not in kept
    ]


def _touched(stream: OpenStream) -> bool:
    """Whether the agent has taken in a part of the answer."""
    return stream.taken > stream.untouched_bytes


def _in_order(calls: Sequence[Call], wanted: Collection[CallId]) -> tuple[CallId, ...]:
    found = {call.call_id: call for call in calls if call.call_id in wanted}
    return tuple(call.call_id for call in sorted(found.values(), key=lambda call: call.intended_seq))
