"""Where forks and rewinds begin, for any history: whose answers come along, who is asked anew, what is left."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.core.conftest import make_call, make_checkpoint, make_stream

from torpor.core.branch import Timeline
from torpor.core.call import Call, CallState
from torpor.core.checkpoint import Checkpoint
from torpor.core.ids import CallId
from torpor.core.origin import Origin, Past, at_checkpoint, at_turn, plan, undone
from torpor.core.redo import redo_set_after_recovery

ALL = Timeline()


def test_a_turn_begins_at_its_own_cut(make):
    first, turn = make.call("a", 2), make.call("b", 5)
    points = [make.checkpoint(1), make.checkpoint(3, make.stream("a")), make.checkpoint(6, make.stream("b"))]
    assert at_turn(points, turn) == at_checkpoint(points[2])
    assert at_turn(points, first) == at_checkpoint(points[1])


def test_a_turn_without_a_cut_begins_at_the_one_before_and_repeats_what_lies_between(make):
    calls = {call.call_id: call for call in (make.call("a", 2), make.call("b", 5), make.call("c", 8))}
    points = [make.checkpoint(3, make.stream("a")), make.checkpoint(20)]
    origin = at_turn(points, calls[CallId("c")])
    assert origin == Origin(checkpoint=points[0], past_seq=7, turn=CallId("c"))
    joined = plan(origin, calls, ALL, resample=False)
    assert (joined.kept, joined.pending, joined.anew) == (("a", "b", "c"), ("b", "c"), ())
    anew = plan(origin, calls, ALL, resample=True)
    assert (anew.kept, anew.pending, anew.anew) == (("a", "b"), ("b",), ())


def test_a_turn_whose_answer_the_cut_has_is_no_place_to_begin_but_the_cut_before_is(make):
    turn = make.call("b", 5)
    seen = make.checkpoint(6, make.stream("b", taken=10))
    assert at_turn([seen], turn) is None
    assert at_turn([make.checkpoint(1), seen], turn) == Origin(
        checkpoint=make.checkpoint(1), past_seq=4, turn=CallId("b")
    )


def test_what_is_no_models_keeps_its_answer_and_what_the_agent_has_a_part_of_goes_on(make):
    calls = {
        call.call_id: call
        for call in (make.call("llm", 2), make.call("ask", 3, is_llm=False), make.call("part", 4), make.call("gone", 5))
    }
    calls[CallId("gone")] = replace(calls[CallId("gone")], state=CallState.FAILED)
    streams = (make.stream("llm"), make.stream("ask"), make.stream("part", taken=9))
    point = replace(
        make.checkpoint(9, *streams), pending_redo=(CallId("gone"),), joinable=(CallId("llm"), CallId("ask"))
    )
    anew = plan(at_checkpoint(point), calls, ALL, resample=True)
    assert (anew.anew, anew.kept) == (("llm",), ("ask", "part"))
    assert (anew.pending, anew.joinable) == ((), ())
    joined = plan(at_checkpoint(point), calls, ALL, resample=False)
    assert (joined.anew, joined.kept) == ((), ("llm", "ask", "part"))


def test_a_point_names_what_was_asked_anew_however_often(make):
    point = make.checkpoint(9, make.stream("a", attempt=3), make.stream("z"))
    past = Past(replaced={CallId("a"): CallId("b"), CallId("b"): CallId("c")})
    streams = past.point(point).open_streams
    assert [(stream.call_id, stream.attempt) for stream in streams] == [("c", 1), ("z", 1)]


@st.composite
def histories(draw) -> tuple[list[Call], list[Checkpoint], int]:
    """Calls one after the other, some of them at once; cuts between; and one of the turns."""
    calls: list[Call] = []
    seq = 1
    points = [make_checkpoint(1)]
    for number in range(draw(st.integers(1, 8))):
        seq += draw(st.integers(1, 3))
        calls.append(make_call(f"c{number}", seq, is_llm=draw(st.booleans()) or number == 0))
        if draw(st.booleans()):
            seq += 1
            newest = [call.call_id for call in calls[-2:]]
            opened = draw(st.lists(st.sampled_from(newest), unique=True)) if draw(st.booleans()) else newest[-1:]
            streams = [make_stream(call_id, taken=draw(st.sampled_from([0, 0, 7]))) for call_id in opened]
            points.append(make_checkpoint(seq, *streams))
    turns = [index for index, call in enumerate(calls) if call.is_llm]
    return calls, points, draw(st.sampled_from(turns))


@given(histories(), st.booleans())
def test_each_call_is_in_one_part_of_a_plan_and_the_turn_is_unseen(history, resample):
    calls, points, turn = history
    by_id = {call.call_id: call for call in calls}
    origin = at_turn(points, calls[turn])
    assert origin is not None, "the first checkpoint is before everything"
    planned = plan(origin, by_id, ALL, resample=resample)
    opened = {stream.call_id: stream for stream in origin.checkpoint.open_streams}
    assert not set(planned.kept) & set(planned.anew)
    assert not set(planned.pending) & set(opened)
    assert set(planned.pending) <= set(planned.kept)
    assert set(opened) & set(by_id) <= {*planned.kept, *planned.anew}
    assert all(by_id[call_id].is_llm and opened[call_id].taken == 0 for call_id in planned.anew)
    # The turn is there to be answered, or to be asked anew, and nothing that was made after it comes along.
    meant = calls[turn].call_id
    assert (meant in planned.kept) == (not resample)
    assert all(by_id[call_id].intended_seq <= calls[turn].intended_seq or call_id in opened for call_id in planned.kept)
    left = {call.call_id for call in undone(origin, calls, ALL, planned.kept)}
    assert not left & {*planned.kept, *(call_id for call_id in opened if call_id != meant)}


@given(histories())
def test_no_rung_below_a_rewind_offers_what_it_left_or_asked_anew(history):
    calls, points, turn = history
    by_id = {call.call_id: call for call in calls}
    origin = at_turn(points, calls[turn])
    assert origin is not None
    planned = plan(origin, by_id, ALL, resample=True)
    at_seq = max(call.intended_seq for call in calls) + 100
    past = Past(
        timeline=Timeline.of_rewinds([(origin.past_seq, at_seq)]),
        replaced={call_id: CallId(f"{call_id} anew") for call_id in planned.anew},
    )
    left = {call.call_id for call in undone(origin, calls, ALL, planned.kept)}
    for point in points:
        if point.seq <= origin.checkpoint.seq:
            redo = redo_set_after_recovery(past.calls(by_id), past.point(point), past.timeline)
            offered = {*redo.pending, *redo.joinable, *redo.attached}
            assert not offered & {*left, *planned.anew}


@pytest.mark.parametrize("resample", [False, True])
def test_only_what_the_timeline_did_leads_to_a_turn(make, resample):
    """Calls that an earlier rewind left lie between the cut and the turn, and answer nothing."""
    calls = {call.call_id: call for call in (make.call("left", 4), make.call("b", 12), make.call("c", 14))}
    timeline = Timeline.of_rewinds([(3, 10)])
    origin = Origin(checkpoint=make.checkpoint(3), past_seq=13, turn=CallId("c"))
    planned = plan(origin, calls, timeline, resample=resample)
    assert "left" not in planned.kept
    assert "b" in planned.kept
