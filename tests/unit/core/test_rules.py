"""The smaller rules: statuses, branches, delivery, output, ownership, checkpoints."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.core.branch import ContextTree, Timeline
from torpor.core.call import CONTINUE, CallState, ResponseHead, response_bytes, state_without_pump
from torpor.core.checkpoint import (
    StreamFate,
    cut_order,
    every_stream_goes_on,
    holds_barrier,
    recovery_floor,
    restore_order,
    stream_fate,
    stream_fate_after_rewind,
)
from torpor.core.delivery import Tape, untouched_bytes
from torpor.core.errors import Conflict, Superseded
from torpor.core.ids import NodeId, SessionId
from torpor.core.lease import Lease, TakeOver, check_owner_token, next_owner_token, take_over
from torpor.core.output import OutputTrack
from torpor.core.session import ENDED, TRANSITIONS, SessionStatus, check_transition, diagram, may_follow

SESSION = SessionId("ses_1")


# --- session -------------------------------------------------------------------------------------------------------


def test_every_status_has_a_row_and_only_ended_ones_have_no_successor():
    assert set(TRANSITIONS) == set(SessionStatus)
    assert {status for status, after in TRANSITIONS.items() if not after} == ENDED


def test_every_status_is_reachable_and_may_reach_an_end():
    reached = {SessionStatus.CREATED}
    for _ in SessionStatus:
        reached |= {after for status in reached for after in TRANSITIONS[status]}
    assert reached == set(SessionStatus)
    assert all(SessionStatus.CANCELLED in TRANSITIONS[status] for status in set(SessionStatus) - ENDED)


@pytest.mark.parametrize("edge", ["hibernating running", "waking asleep", "running recovering"])
def test_the_edges_of_the_crash_rules_are_there(edge: str):
    one, other = map(SessionStatus, edge.split())
    assert may_follow(one, other)
    assert f"    {one} --> {other}" in diagram()


def test_a_forbidden_transition_is_refused_with_what_is_allowed():
    with pytest.raises(Conflict) as caught:
        check_transition(SESSION, SessionStatus.ASLEEP, SessionStatus.SUCCEEDED)
    assert caught.value.code == "session_transition_refused"
    assert "waking" in caught.value.hint


# --- branches ------------------------------------------------------------------------------------------------------


def test_a_call_hangs_on_the_cursor_and_a_match_moves_it():
    tree = ContextTree(1)
    assert [tree.hang(seq) for seq in (2, 4)] == [1, 2]
    tree.rewind(1)
    tree.reach(2)
    assert tree.hang(9) == 2
    assert tree.ancestors() == [9, 2, 1]


def test_a_parallel_agent_that_repeats_in_another_order_stays_on_its_path():
    tree = ContextTree(1)
    tree.hang(2)
    tree.hang(3)
    tree.rewind(1)
    tree.reach(3)
    tree.reach(2)
    assert tree.cursor == 3


@pytest.mark.parametrize("verb", ["reach", "rewind"])
def test_the_cursor_moves_only_to_context_events(verb: str):
    with pytest.raises(ValueError, match="not a context event"):
        getattr(ContextTree(1), verb)(7)


def test_parents_are_older_so_no_cycle_can_arise():
    with pytest.raises(ValueError, match="not an older"):
        ContextTree(5).load(4, 5)


def test_a_rewind_takes_the_stretch_after_its_cut_off_the_timeline():
    timeline = Timeline.of_rewinds([(10, 20), (5, 30)])
    assert [seq for seq in (4, 6, 12, 20, 25, 30, 31) if timeline.holds(seq)] == [4, 30, 31]
    assert Timeline.of_rewinds([(10, 20), (25, 30)]).holds(22)
    with pytest.raises(ValueError, match="not in the past"):
        Timeline.of_rewinds([(10, 20), (15, 30)])


# --- delivery ------------------------------------------------------------------------------------------------------

HEADS = st.builds(
    ResponseHead,
    status=st.just(200),
    reason=st.just("OK"),
    headers=st.just((("a", "b"),)),
    continued=st.booleans(),
    bodiless=st.booleans(),
    chunked=st.booleans(),
)


@given(HEADS, st.lists(st.binary(max_size=20), max_size=5), st.integers(0, 300), st.booleans())
def test_a_tape_from_any_offset_is_the_rest_of_the_pure_function(head: ResponseHead, chunks, start: int, early: bool):
    whole = response_bytes(head, chunks, finished=True)
    start = min(start, len(whole))
    tape = Tape(start)
    parts = [tape.continue_()] if head.continued and early else []
    parts += [tape.head(head), *map(tape.chunk, chunks), tape.finish()]
    assert b"".join(parts) == whole[start:]
    assert tape.ended
    assert tape.position == len(whole)


def test_a_tape_refuses_a_second_head_and_a_body_without_one(make):
    tape = Tape()
    with pytest.raises(ValueError, match="before its head"):
        tape.chunk(b"x")
    tape.head(make.head)
    with pytest.raises(ValueError, match="second head"):
        tape.head(make.head)


def test_an_interim_continue_is_no_part_of_an_answer(make):
    assert untouched_bytes(None, continued=True) == len(CONTINUE)
    assert untouched_bytes(make.head, continued=False) == 0


# --- output --------------------------------------------------------------------------------------------------------


def run(track: OutputTrack, pieces: list[bytes]) -> tuple[bytes, list[int]]:
    results = [track.take(piece) for piece in pieces]
    return b"".join(r.fresh for r in results), [r.differs_at for r in results if r.differs_at is not None]


def test_equal_output_is_suppressed_and_what_follows_is_new():
    assert run(OutputTrack(100, b"hello"), [b"he", b"llo wor", b"ld"]) == (b" world", [])


def test_the_first_difference_is_marked_once():
    assert run(OutputTrack(100, b"hello world"), [b"hel", b"p wor", b"ld"]) == (b"p world", [103])


def test_output_that_was_not_written_again_is_superseded_at_the_end():
    track = OutputTrack(100, b"hello")
    assert track.take(b"he").fresh == b""
    assert track.finish().differs_at == 102
    assert OutputTrack(100, b"").finish().differs_at is None


@given(st.binary(max_size=30), st.lists(st.binary(max_size=8), max_size=8), st.integers(0, 50))
def test_record_and_fresh_output_make_the_output_of_the_last_incarnation(recorded: bytes, pieces, position: int):
    track, shown = OutputTrack(position, recorded), recorded
    for piece in pieces:
        output = track.take(piece)
        if output.differs_at is not None:
            shown = shown[: output.differs_at - position]
        assert output.fresh == b"" or output.offset == position + len(shown)
        shown += output.fresh
    written = b"".join(pieces)
    assert shown == written or (shown == recorded and recorded.startswith(written))


# --- ownership -----------------------------------------------------------------------------------------------------

LEASE = Lease(session_id=SESSION, owner_token=4, node_id=NodeId("node_1"), boot_id="boot-1", pid=9)


@pytest.mark.parametrize(
    ("lease", "boot_id", "got_flock", "owner_answers", "expected"),
    [
        (None, "boot-1", True, False, TakeOver.ACQUIRE),
        (LEASE, "boot-1", True, False, TakeOver.ACQUIRE),
        (LEASE, "boot-2", True, True, TakeOver.ACQUIRE),
        (LEASE, "boot-1", False, True, TakeOver.REFUSE),
        (LEASE, "boot-1", False, False, TakeOver.KILL_FIRST),
        (LEASE, "boot-2", False, False, TakeOver.REFUSE),
        (None, "boot-1", False, False, TakeOver.REFUSE),
    ],
)
def test_the_flock_decides_and_a_row_of_another_boot_kills_nobody(lease, boot_id, got_flock, owner_answers, expected):
    assert take_over(lease, boot_id=boot_id, got_flock=got_flock, owner_answers=owner_answers) is expected


def test_the_token_rises_at_every_acquisition_and_an_old_one_writes_nothing():
    assert [next_owner_token(None), next_owner_token(LEASE)] == [1, 5]
    check_owner_token(SESSION, presented=5, current=5)
    with pytest.raises(Superseded, match="4 was superseded by 5"):
        check_owner_token(SESSION, presented=4, current=5)


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "taken", "pump_alive", "expected"),
    [
        (CallState.ANSWERED, 5, False, StreamFate.DELIVER),
        (CallState.SENT, 5, True, StreamFate.DELIVER),
        (CallState.SENT, 5, False, StreamFate.RESET),
        (CallState.SENT, 0, False, StreamFate.RESEND),
        (CallState.TORN, 0, False, StreamFate.RESEND),
        (CallState.INTENDED, 0, False, StreamFate.RESEND),
    ],
)
def test_a_stream_is_delivered_sent_again_or_reset(make, state, taken, pump_alive, expected):
    call = make.call("c", 5, state=state, attempts=(make.attempt(finished=state is CallState.ANSWERED),))
    assert stream_fate(make.stream("c", taken=taken), call, pump_alive=pump_alive) is expected


def test_bytes_of_an_attempt_that_was_given_up_are_never_continued_by_the_next(make):
    call = make.call("c", 5, attempts=(make.attempt(1, finished=False), make.attempt(2)))
    assert stream_fate(make.stream("c", taken=5), call, pump_alive=False) is StreamFate.RESET
    assert stream_fate(make.stream("c", taken=0), call, pump_alive=False) is StreamFate.DELIVER
    assert stream_fate(make.stream("c", taken=5, attempt=2), call, pump_alive=False) is StreamFate.DELIVER


@pytest.mark.parametrize("state", [CallState.TORN, CallState.UNKNOWN])
def test_a_pump_that_has_not_sent_yet_does_not_continue_what_was_torn(make, state: CallState):
    call = make.call("c", 5, state=state, attempts=(make.attempt(finished=False),))
    assert stream_fate(make.stream("c", taken=5), call, pump_alive=True) is StreamFate.RESET
    assert stream_fate(make.stream("c", taken=0), call, pump_alive=True) is StreamFate.DELIVER


def test_an_effect_of_unknown_outcome_waits_for_a_person_and_a_mere_reading_does_not(make):
    for method, expected in [("POST", StreamFate.ASK), ("GET", StreamFate.RESEND)]:
        call = make.call("c", 5, state=CallState.SENT, is_llm=False, method=method)
        assert stream_fate(make.stream("c"), call, pump_alive=False) is expected
    held = make.call("c", 5, state=CallState.INTENDED, is_llm=False, barrier=True, attempts=())
    assert stream_fate(make.stream("c"), held, pump_alive=False) is StreamFate.RESEND, "held is safe to send"


def test_a_call_without_its_pump_is_torn_or_unknown(make):
    sent = make.call("c", 5, state=CallState.SENT)
    assert state_without_pump(sent) is CallState.TORN
    assert state_without_pump(make.call("c", 5, state=CallState.SENT, is_llm=False)) is CallState.UNKNOWN
    assert state_without_pump(make.call("c", 5, state=CallState.SENT, barrier=True)) is CallState.UNKNOWN
    assert state_without_pump(make.call("c", 5)) is CallState.ANSWERED


def test_a_rewind_asks_a_model_anew_but_not_the_outside(make):
    for changes, expected in [({}, StreamFate.RESAMPLE), ({"is_llm": False}, StreamFate.DELIVER)]:
        call = make.call("c", 5, **changes)
        assert stream_fate_after_rewind(make.stream("c"), call, pump_alive=False) is expected
    assert (
        stream_fate_after_rewind(make.stream("c", taken=5), make.call("c", 5), pump_alive=False) is StreamFate.DELIVER
    )


def test_recovery_stays_above_the_last_barrier_call_that_was_sent(make):
    calls = [
        make.call("sent", 7, barrier=True),
        make.call("held", 9, barrier=True, attempts=(), state=CallState.INTENDED),
        make.call("plain", 11),
    ]
    assert recovery_floor(calls, Timeline()) == 7
    assert recovery_floor(calls, Timeline().rewound(to_seq=5, at_seq=20)) == 0


def test_a_barrier_call_may_be_sent_once_a_cut_holds_its_untouched_stream(make):
    assert holds_barrier(make.checkpoint(9, make.stream("c")), "c")
    assert not holds_barrier(make.checkpoint(9, make.stream("c", taken=3)), "c")
    assert not holds_barrier(make.checkpoint(9), "c")


def test_a_request_that_is_not_complete_is_received_further(make):
    assert stream_fate(make.stream(None), None, pump_alive=False) is StreamFate.RECEIVE


def test_the_newest_eligible_checkpoint_restores_first_and_the_others_come_after(make):
    torn = make.call("c", 5, state=CallState.SENT, attempts=(make.attempt(finished=False),))
    old, bad, new = (
        make.checkpoint(1),
        make.checkpoint(6, make.stream("c")),
        make.checkpoint(9, make.stream("c", taken=3)),
    )
    order = restore_order([old, new, bad], {"c": torn}, lambda call_id: False)
    assert order == [bad, old, new]
    assert not every_stream_goes_on(new.open_streams, {"c": torn}, lambda call_id: False)
    assert every_stream_goes_on(new.open_streams, {"c": torn}, lambda call_id: True)


def test_of_two_cuts_at_the_same_event_the_later_one_is_the_newer(make):
    """The second was made while the first was being committed, so no event came between them."""
    first, second = make.checkpoint(6, number=1), make.checkpoint(6, number=2)
    assert restore_order([first, second], {}, lambda call_id: False) == [second, first]
    assert max([first, second], key=cut_order) is second
