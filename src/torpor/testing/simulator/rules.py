"""Every decision that the simulated node takes, in one list, so that a mutation is one line (see `mutations`).

Functions are torpor.core's own. A flag names a step whose order or presence is the rule.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torpor.core.branch import Timeline
from torpor.core.call import Call, CallState, state_without_pump
from torpor.core.checkpoint import (
    Checkpoint,
    OpenStream,
    PumpAlive,
    StreamFate,
    every_stream_goes_on,
    recovery_floor,
    restore_order,
    stream_fate,
)
from torpor.core.ids import CallId
from torpor.core.join import StreamEnd
from torpor.core.lease import TakeOver, take_over
from torpor.core.money import Account, Verdict, decide
from torpor.core.redo import RedoSet, redo_set_after_recovery


def as_it_ended(end: StreamEnd) -> StreamEnd:
    return end


@dataclass(slots=True, kw_only=True)
class Rules:
    """The rules in force. The defaults are RECOVERY's."""

    stream_fate: Callable[..., StreamFate] = stream_fate
    every_stream_goes_on: Callable[[Iterable[OpenStream], Mapping[CallId, Call], PumpAlive], bool] = (
        every_stream_goes_on
    )
    restore_order: Callable[[Sequence[Checkpoint], Mapping[CallId, Call], PumpAlive], list[Checkpoint]] = restore_order
    recovery_floor: Callable[[Iterable[Call], Timeline], int] = recovery_floor
    state_without_pump: Callable[[Call], CallState] = state_without_pump
    redo_set: Callable[[Iterable[Call], Checkpoint, Timeline], RedoSet] = redo_set_after_recovery
    stream_end: Callable[[StreamEnd], StreamEnd] = as_it_ended
    take_over: Callable[..., TakeOver] = take_over
    decide: Callable[[Account, int], Verdict] = decide

    check_owner_token: bool = True
    fsync_before_send: bool = True
    fsync_before_telling: bool = True
    destroy_before_restore: bool = True
    watchdog_pauses: bool = True
    host_takes_guests_position: bool = True
    closed_fifo_is_dropped: bool = True
    pump_outlives_sandbox: bool = True
    only_refusals_are_sent_again: bool = True
    truncation_resets: bool = True
    resume_restored_streams: bool = True
    hold_during_cut: bool = True
    workspace_while_paused: bool = True
    packs_before_commit: bool = True
    seq_of_the_cut: bool = True
    settle_before_restore: bool = True
    verify_snapshots: bool = True
    barrier_waits_for_checkpoint: bool = True
    sleep_only_if_nothing_waits: bool = True
    wake_with_the_message: bool = True
    exit_commits_before_telling: bool = True
    suppress_repeated_output: bool = True
    new_calls_may_be_joined: bool = True
    match_binds_at_once: bool = True
    side_paths_count: bool = True
    status_tells_how_closed: bool = True
    close_goes_first: bool = True
    close_outlives_acknowledgement: bool = True
    close_logged_before_forgotten: bool = True
    cut_names_logged_calls_only: bool = True
    missing_output_counts: bool = True
    held_call_asks_again: bool = True
    raise_wakes_held_calls: bool = True
    reserved_with_the_sending: bool = True
    unknown_costs_count: bool = True
