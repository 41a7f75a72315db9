"""A checkpoint: an immutable point of a session, and the rules of which one restores.

Pure. RECOVERY's cut is here as data: the log position, the streams that were open with their positions, and the
output offsets, all of one instant. `seq` is the cut's; the commit's own event comes after it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from torpor.core.branch import Timeline
from torpor.core.call import Call, CallState
from torpor.core.ids import CallId, CheckpointId, SessionId, SnapshotId, StreamId

FORKED, REWOUND = "fork", "rewind"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStream:
    """One stream as it was at a cut.

    Attributes:
        call_id: None while its request has not been durably intended.
        read, acknowledged, taken: R, A and V of the init protocol, in bytes.
        untouched_bytes: response bytes that do not count as an answer (an interim 100 Continue).
        attempt: the attempt that `taken` counts bytes of.
    """

    stream: StreamId
    port: int
    call_id: CallId | None
    read: int
    acknowledged: int
    taken: int
    untouched_bytes: int = 0
    attempt: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One row of the checkpoint table.

    Attributes:
        seq: the log head at the cut.
        cursor_seq: the last context event of the branch at the cut.
        incarnation: the life of the sandbox that was cut.
        snapshot_id: None for a checkpoint without an image (checkpoint 0 of a workspace before the agent starts).
        manifest_digest: SHA-256 (hex) of the snapshot's manifest, checked before a restore.
        next_stream: streams of a restored incarnation that are not inherited count from here.
        stdout_bytes, stderr_bytes: output read from the agent up to the cut.
        reason: "start", "call", "age", "manual", "agent", "stop", "exit"; FORKED and REWOUND have another one's image.
        freeze_ns, commit_ns, raw_bytes, stored_bytes: measurements, for people.
        pending_redo: calls of earlier redo sets that the agent had not yet made again at the cut.
        joinable: calls whose stream had ended unconsumed at the cut: the agent may be about to retry them.
    """

    checkpoint_id: CheckpointId
    session_id: SessionId
    number: int
    seq: int
    committed_seq: int
    cursor_seq: int
    incarnation: int
    snapshot_id: SnapshotId
    manifest_digest: str
    has_memory: bool
    open_streams: tuple[OpenStream, ...]
    next_stream: int
    stdout_bytes: int
    stderr_bytes: int
    reason: str
    wall_ns: int
    freeze_ns: int
    commit_ns: int
    raw_bytes: int
    stored_bytes: int
    pending_redo: tuple[CallId, ...] = ()
    joinable: tuple[CallId, ...] = ()


def cut_order(point: Checkpoint) -> tuple[int, int]:
    """Key that sorts a session's checkpoints, oldest cut first.

    The position alone does not: the next cut does not wait for a commit, so two of them may stand at the same event.
    """
    return point.seq, point.number


class StreamFate(StrEnum):
    """What a restored (or adopted) sandbox's open stream gets."""

    DELIVER = "deliver"
    """From the log (or the live pump), from the guest's V on."""
    RESEND = "resend"
    """The call goes upstream again as its next attempt; V is 0, so no byte of the torn one is seen."""
    RECEIVE = "receive"
    """Its request is not complete: go on receiving it."""
    RESET = "reset"
    """The agent saw part of an answer that can't be continued."""
    ASK = "ask"
    """A barrier effect was sent and nobody knows its outcome: the stream waits for a person's decision."""
    RESAMPLE = "resample"
    """After a rewind: a new call takes the stream over."""


_GIVEN_UP = frozenset({CallState.TORN, CallState.UNKNOWN})


def stream_fate(stream: OpenStream, call: Call | None, *, pump_alive: bool) -> StreamFate:
    """Decide one stream: answered or still arriving is delivered, torn is sent again only if nothing of it was seen."""
    if call is None:
        return StreamFate.RECEIVE
    touched = stream.taken > stream.untouched_bytes
    given_up = call.state in _GIVEN_UP or (bool(call.attempts) and call.attempts[-1].number != stream.attempt)
    if touched and given_up:
        # The agent holds bytes of an attempt that was given up: no other attempt may go on where it stopped. A pump
        # that lives is one that has not written yet that it sends the next attempt.
        return StreamFate.RESET
    if call.answered or pump_alive:
        return StreamFate.DELIVER
    if call.state is CallState.FAILED:
        # Its recorded error response, if any, is complete and is delivered; a failure without one resets.
        return StreamFate.DELIVER if call.attempts and call.attempts[-1].finished else StreamFate.RESET
    if touched:
        return StreamFate.RESET
    return StreamFate.RESEND if call.state is CallState.INTENDED or call.may_be_sent_again else StreamFate.ASK


def stream_fate_after_rewind(stream: OpenStream, call: Call | None, *, pump_alive: bool) -> StreamFate:
    """As `stream_fate`, but a model is asked anew where the agent saw nothing of its answer yet (RECOVERY 5.1)."""
    fate = stream_fate(stream, call, pump_alive=pump_alive)
    untouched = stream.taken <= stream.untouched_bytes
    return StreamFate.RESAMPLE if call is not None and call.is_llm and untouched else fate


PumpAlive: TypeAlias = Callable[[CallId], bool]
"""Whether this node is still receiving a call's answer."""


def every_stream_goes_on(streams: Iterable[OpenStream], calls: Mapping[CallId, Call], pump_alive: PumpAlive) -> bool:
    """None of these streams needs a RESET. A live sandbox of which this is false is not adopted (RECOVERY 4)."""
    return all(
        stream_fate(
            stream,
            calls.get(stream.call_id) if stream.call_id else None,
            pump_alive=stream.call_id is not None and pump_alive(stream.call_id),
        )
        is not StreamFate.RESET
        for stream in streams
    )


def eligible(checkpoint: Checkpoint, calls: Mapping[CallId, Call], pump_alive: PumpAlive) -> bool:
    """Every stream open at its cut is answered, or its pump is alive, or nothing of its answer was delivered."""
    return every_stream_goes_on(checkpoint.open_streams, calls, pump_alive)


def sure_to_restore(checkpoint: Checkpoint, calls: Mapping[CallId, Call]) -> bool:
    """Whether it stays eligible if its node dies at this instant: no pump that lives now is counted upon.

    The newest such checkpoint is never forgotten. All newer ones may have been cut amid one long answer, and a death
    would leave nothing but resets. Once true it stays true.
    """
    return eligible(checkpoint, calls, lambda _call_id: False)


def restore_order(
    checkpoints: Sequence[Checkpoint], calls: Mapping[CallId, Call], pump_alive: PumpAlive
) -> list[Checkpoint]:
    """The ladder: newest eligible first, and when none is eligible, newest first (its torn streams are RESET)."""
    newest_first = sorted(checkpoints, key=cut_order, reverse=True)
    good = [point for point in newest_first if eligible(point, calls, pump_alive)]
    return good + [point for point in newest_first if point not in good]


def recovery_floor(calls: Iterable[Call], timeline: Timeline) -> int:
    """The seq below which no cut restores without a person's decision (RECOVERY 4): the last barrier call sent.

    An agent that is taken back to before it might ask for the effect in other words, and it would happen twice.
    """
    sent = [call.intended_seq for call in calls if call.barrier and call.attempts and timeline.holds(call.intended_seq)]
    return max(sent, default=0)


def holds_barrier(checkpoint: Checkpoint, call_id: CallId) -> bool:
    """Whether this cut holds the call's stream with nothing of an answer, so that the call may be sent (RECOVERY 7)."""
    return any(
        stream.call_id == call_id and stream.taken <= stream.untouched_bytes for stream in checkpoint.open_streams
    )
