"""Rules broken on purpose, one at a time: a simulator that does not notice would prove nothing.

Each mutation changes one decision in `Rules` and names the invariants that it may be caught by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torpor.core.branch import Timeline
from torpor.core.call import Call, CallState
from torpor.core.checkpoint import Checkpoint, OpenStream, StreamFate, stream_fate
from torpor.core.join import StreamEnd
from torpor.core.lease import TakeOver
from torpor.core.redo import RedoEntry, RedoSet, redo_set_after_recovery
from torpor.testing.simulator.rules import Rules


@dataclass(frozen=True, slots=True)
class Mutation:
    """One way to break a rule.

    Attributes:
        section: of RECOVERY.
        caught_by: numbers of the invariants that may fail first.
        breaks: what no longer holds, as a sentence.
    """

    section: str
    caught_by: frozenset[int]
    breaks: str
    change: Callable[[Rules], Rules]

    def rules(self) -> Rules:
        return self.change(Rules())


def _flag(name: str) -> Callable[[Rules], Rules]:
    return lambda rules: replace(rules, **{name: False})


def _with(**changes: Any) -> Callable[[Rules], Rules]:
    return lambda rules: replace(rules, **changes)


def _fate_without_torn(stream: OpenStream, call: Call | None, *, pump_alive: bool) -> StreamFate:
    fate = stream_fate(stream, call, pump_alive=pump_alive)
    failed = call is not None and call.state is CallState.FAILED
    return StreamFate.RESEND if fate is StreamFate.RESET and not failed else fate


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_args, **_options: value


class _NeverConsumed(RedoSet):
    __slots__ = ()

    def attach(self, entry: RedoEntry) -> None:
        self._attached[entry.call_id] = entry


def _redo_never_consumed(calls: Iterable[Call], point: Checkpoint, timeline: Timeline) -> RedoSet:
    entries = {call.call_id: call for call in calls}
    redo = redo_set_after_recovery(entries.values(), point, timeline)
    redo.__class__ = _NeverConsumed
    return redo


def _redo_across_rewinds(calls: Iterable[Call], point: Checkpoint, timeline: Timeline) -> RedoSet:
    del timeline
    return redo_set_after_recovery(calls, point, Timeline())


def _redo_without(**fields: Any) -> Callable[..., RedoSet]:
    def build(calls: Iterable[Call], point: Checkpoint, timeline: Timeline) -> RedoSet:
        return redo_set_after_recovery(calls, replace(point, **fields), timeline)

    return build


def _redo_empty(calls: Iterable[Call], point: Checkpoint, timeline: Timeline) -> RedoSet:
    before = [call for call in calls if call.intended_seq <= point.seq]
    return redo_set_after_recovery(before, point, timeline)


def _torn_even_if_unsafe(call: Call) -> CallState:
    return CallState.TORN if call.state is CallState.SENT else call.state


def _take_without_kill(*_args: Any, **_options: Any) -> TakeOver:
    return TakeOver.ACQUIRE


def _mutation(section: str, caught_by: Iterable[int], breaks: str, change: Callable[[Rules], Rules]) -> Mutation:
    return Mutation(section, frozenset(caught_by), breaks, change)


MUTATIONS: dict[str, Mutation] = {
    "pump-dies-with-sandbox": _mutation(
        "12.1", {1}, "killing the sandbox cancels the call", _flag("pump_outlives_sandbox")
    ),
    "broken-answer-sent-again": _mutation(
        "12.1", {1, 7}, "an answer that broke off is asked for again", _flag("only_refusals_are_sent_again")
    ),
    "torn-answer-goes-on": _mutation(
        "4",
        {2},
        "attempt 2 goes on where attempt 1 stopped",
        _with(stream_fate=_fate_without_torn, every_stream_goes_on=_always(True)),
    ),
    "truncation-ends-cleanly": _mutation(
        "2.2", {2}, "a truncated answer ends like a whole one", _flag("truncation_resets")
    ),
    "send-before-fsync": _mutation(
        "6", {3}, "a request leaves before its rows are on disk", _flag("fsync_before_send")
    ),
    "tell-before-fsync": _mutation("6", {3}, "people are told before it is on disk", _flag("fsync_before_telling")),
    "stale-token-writes": _mutation("1", {4}, "a superseded node still writes", _flag("check_owner_token")),
    "two-sandboxes": _mutation("9", {4}, "the old sandbox is left running", _flag("destroy_before_restore")),
    "no-watchdog": _mutation("9", {4}, "a silent node's sandbox runs on", _flag("watchdog_pauses")),
    "owner-not-killed": _mutation("9", {4}, "a silent owner is replaced alive", _with(take_over=_take_without_kill)),
    "frames-of-the-dead": _mutation(
        "2.4", {4, 5, 6}, "what a dead sandbox left in its FIFO is served", _flag("closed_fifo_is_dropped")
    ),
    "host-keeps-position": _mutation(
        "2.4", {5}, "the host keeps its own receive position at a restore", _flag("host_takes_guests_position")
    ),
    "streams-forgotten": _mutation(
        "12.5", {5}, "streams in the image are not resumed", _flag("resume_restored_streams")
    ),
    "delivery-not-held": _mutation("3", {5}, "bytes flow between barrier and image", _flag("hold_during_cut")),
    "no-join": _mutation("5.4", {5, 6}, "a retry is a new call", _with(stream_end=_always(StreamEnd.CONSUMED))),
    "new-calls-not-joined": _mutation(
        "5.4", {5, 6}, "a retry of a call that this incarnation made is a new call", _flag("new_calls_may_be_joined")
    ),
    "join-at-will": _mutation("5.4", {6}, "a consumed answer is joined", _with(stream_end=_always(StreamEnd.GONE))),
    "match-consumes-nothing": _mutation(
        "5.2", {6}, "one entry answers five equal requests", _with(redo_set=_redo_never_consumed)
    ),
    "no-redo": _mutation("5.1", {5, 6, 7}, "calls after the cut are made anew", _with(redo_set=_redo_empty)),
    "redo-by-path": _mutation("5.1", {6}, "the redo set holds only ancestors of the cursor", _flag("side_paths_count")),
    "redo-across-rewind": _mutation(
        "5.1", {6}, "what a rewind undid answers calls", _with(redo_set=_redo_across_rewinds)
    ),
    "pending-forgotten": _mutation(
        "5.1",
        {5, 6, 7, 8},
        "a checkpoint forgets what was still pending",
        _with(redo_set=_redo_without(pending_redo=())),
    ),
    "joinable-forgotten": _mutation(
        "5.1",
        {5, 6, 7, 8},
        "a checkpoint forgets what a client was about to retry",
        _with(redo_set=_redo_without(joinable=())),
    ),
    "bind-after-match": _mutation(
        "5.2", {5, 6, 8}, "a cut comes between a match and its binding", _flag("match_binds_at_once")
    ),
    "close-not-told": _mutation(
        "2.6", {5, 6}, "STATUS does not say how a client closed", _flag("status_tells_how_closed")
    ),
    "retry-overtakes-close": _mutation(
        "5.4", {5, 6}, "init sends a retry before the close that caused it", _flag("close_goes_first")
    ),
    "ack-forgets-close": _mutation(
        "2.5",
        {6},
        "an acknowledgement under way makes init forget a close that nobody heard of",
        _flag("close_outlives_acknowledgement"),
    ),
    "forgotten-before-logged": _mutation(
        "2.5", {5, 6}, "init may forget a close before it is logged", _flag("close_logged_before_forgotten")
    ),
    "cut-names-unlogged": _mutation(
        "3", {6, 8, 0}, "a cut names calls that the log has only after it", _flag("cut_names_logged_calls_only")
    ),
    "barrier-sent-again": _mutation(
        "7", {7}, "a barrier call of unknown outcome is sent again", _with(state_without_pump=_torn_even_if_unsafe)
    ),
    "barrier-without-checkpoint": _mutation(
        "7", {7}, "a barrier call leaves before its checkpoint", _flag("barrier_waits_for_checkpoint")
    ),
    "below-the-barrier": _mutation(
        "4", {7}, "recovery goes below a barrier call that was sent", _with(recovery_floor=_always(0))
    ),
    "sleep-though-resolved": _mutation(
        "8", {5, 8}, "only messages after the cut keep a session awake", _flag("sleep_only_if_nothing_waits")
    ),
    "message-without-wake": _mutation(
        "8", {5, 8}, "a message is accepted without its wake request", _flag("wake_with_the_message")
    ),
    "held-call-sent": _mutation(
        "1", {3}, "the next node sends a held call without asking the budget", _flag("held_call_asks_again")
    ),
    "raise-wakes-nobody": _mutation(
        "1", {5}, "a held call is not told that the budget was raised", _flag("raise_wakes_held_calls")
    ),
    "budget-forgets-torn": _mutation(
        "1", {3}, "an attempt whose cost nobody knows costs nothing", _flag("unknown_costs_count")
    ),
    "reserve-before-sending": _mutation(
        "1", {3}, "a call is admitted in one transaction and sent in the next", _flag("reserved_with_the_sending")
    ),
    "exit-told-first": _mutation(
        "11", {8}, "people hear of an exit before it is committed", _flag("exit_commits_before_telling")
    ),
    "output-shown-twice": _mutation("5.5", {8}, "repeated output is shown again", _flag("suppress_repeated_output")),
    "missing-output-kept": _mutation(
        "5.5", {8}, "output that the last incarnation never wrote stays", _flag("missing_output_counts")
    ),
    "workspace-after-resume": _mutation(
        "3", {9}, "the workspace is captured while the agent runs", _flag("workspace_while_paused")
    ),
    "commit-before-packs": _mutation(
        "6", {10}, "a checkpoint is committed before its packs are on disk", _flag("packs_before_commit")
    ),
    "commit-amid-next-life": _mutation(
        "3",
        {8, 10},
        "a cut of a dead incarnation is committed while the next one lives",
        _flag("settle_before_restore"),
    ),
    "seq-of-the-commit": _mutation("3", {5, 6, 7, 8}, "a checkpoint's seq is read late", _flag("seq_of_the_cut")),
    "damage-unseen": _mutation("12.10", {10}, "a damaged snapshot is restored", _flag("verify_snapshots")),
}
