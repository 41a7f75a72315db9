"""Which checkpoints are kept: what must never be forgotten, and that thinning comes to an end."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from torpor.core.call import CallState
from torpor.core.checkpoint import sure_to_restore
from torpor.core.retention import (
    DAY_NS,
    HOUR_NS,
    Reason,
    RetentionPlan,
    RetentionPoint,
    RetentionPolicy,
    plan_retention,
)

POLICIES = st.builds(
    RetentionPolicy,
    keep_last=st.integers(1, 6),
    keep_hourly=st.integers(0, 5),
    keep_daily=st.integers(0, 5),
)


@st.composite
def sessions(draw: st.DrawFn, *, steady_clock: bool = False) -> list[RetentionPoint]:
    """A session's checkpoints, oldest first. The clock may jump backwards, and some are damaged."""
    lowest = 0 if steady_clock else -3 * DAY_NS
    wall_ns, points = 100 * DAY_NS, list[RetentionPoint]()
    for number in range(draw(st.integers(0, 40))):
        wall_ns += draw(st.sampled_from([0, HOUR_NS // 7, HOUR_NS, 5 * HOUR_NS, DAY_NS, max(lowest, -DAY_NS)]))
        damaged = not steady_clock and draw(st.integers(0, 5)) == 0
        points.append(RetentionPoint(number=number, wall_ns=wall_ns, damaged=damaged))
    return points


def kept(points: Sequence[RetentionPoint], plan: RetentionPlan) -> list[RetentionPoint]:
    return [point for point in points if point.number in plan.kept]


@given(sessions(), POLICIES, st.sets(st.integers(0, 50)), st.sets(st.integers(0, 50)), st.sets(st.integers(0, 50)))
def test_what_must_stay_stays(points, policy, pinned, forked, in_use) -> None:
    plan = plan_retention(points, policy, pinned=pinned, forked=forked, in_use=in_use)
    numbers = {point.number for point in points}
    intact = [point.number for point in points if not point.damaged]
    must_stay = (pinned | forked | in_use) & numbers | {*intact[:1], *intact[-policy.keep_last :]}
    assert must_stay <= set(plan.kept)
    assert set(plan.kept) | set(plan.forgotten) == numbers
    assert not set(plan.kept) & set(plan.forgotten)


@given(sessions(), POLICIES)
def test_thinning_twice_is_thinning_once(points, policy) -> None:
    once = plan_retention(points, policy)
    again = plan_retention(kept(points, once), policy)
    assert again.forgotten == ()
    assert set(again.kept) == set(once.kept)


@given(sessions(steady_clock=True), POLICIES)
def test_thinning_after_each_commit_ends_where_thinning_at_the_end_does(points, policy) -> None:
    left: list[RetentionPoint] = []
    for point in points:
        left = kept([*left, point], plan_retention([*left, point], policy))
    assert left == kept(points, plan_retention(points, policy))


@given(sessions(), POLICIES)
def test_the_number_that_is_kept_has_a_bound(points, policy) -> None:
    plan = plan_retention(points, policy)
    damaged = sum(point.damaged for point in points)
    assert len(plan.kept) <= policy.keep_last + policy.keep_hourly + policy.keep_daily + 1 + damaged


@given(sessions(), POLICIES)
def test_damaged_ones_do_not_count_and_go_once_enough_newer_ones_restore(points, policy) -> None:
    plan = plan_retention(points, policy)
    for point in points:
        if point.damaged:
            newer = sum(not other.damaged and other.number > point.number for other in points)
            assert (point.number in plan.kept) == (newer < policy.keep_last)


def hours(*ages: float) -> list[RetentionPoint]:
    """Checkpoints of these ages in hours, given oldest first, counted from the end of a day."""
    end = 1000 * DAY_NS - 1
    return [RetentionPoint(number=n, wall_ns=end - round(age * HOUR_NS)) for n, age in enumerate(ages)]


def test_older_ones_are_thinned_to_the_newest_of_each_hour_and_then_of_each_day() -> None:
    points = hours(51, 50, 49, 26, 25, 2.9, 2.5, 1.5, 1.2, 0.5, 0.4, 0.3)
    plan = plan_retention(points, RetentionPolicy(keep_last=2, keep_hourly=3, keep_daily=3))
    assert dict(plan.kept) == {
        0: Reason.FIRST,
        2: Reason.DAILY,
        4: Reason.DAILY,
        6: Reason.HOURLY,
        8: Reason.HOURLY,
        10: Reason.LAST,
        11: Reason.LAST,
    }
    assert plan.forgotten == (1, 3, 5, 7, 9)


def test_zero_switches_a_rule_off() -> None:
    points = hours(100, 50, 25, 2, 1, 0)
    plan = plan_retention(points, RetentionPolicy(keep_last=1, keep_hourly=0, keep_daily=0))
    assert dict(plan.kept) == {0: Reason.FIRST, 5: Reason.LAST}


def test_a_checkpoint_cut_amid_an_answer_is_not_sure_until_the_answer_is_whole(make) -> None:
    arriving = make.call("call_1", 5, state=CallState.SENT, attempts=(make.attempt(finished=False),))
    amid, before = make.checkpoint(6, make.stream("call_1", taken=3)), make.checkpoint(6, make.stream("call_1"))
    assert not sure_to_restore(amid, {arriving.call_id: arriving})
    assert sure_to_restore(before, {arriving.call_id: arriving})
    answered = make.call("call_1", 5)
    assert sure_to_restore(amid, {answered.call_id: answered})
