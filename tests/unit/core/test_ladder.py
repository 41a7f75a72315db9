"""Which rungs are tried for a session whose sandbox is gone, and in which order."""

import itertools

import pytest

from torpor.core.call import CallState
from torpor.core.ladder import OnLost, Way, ladder, redo_set_of_lost


def rungs(points, calls=(), **wanted) -> list[tuple[str, int]]:
    by_id = {call.call_id: call for call in calls}
    options = {"on_lost": OnLost.BOOT, "had_memory": False, **wanted}
    return [(step.way.value, step.checkpoint.seq) for step in ladder(points, by_id, lambda _: False, **options)]


def test_memories_go_first_and_then_the_newest_files(make) -> None:
    points = [make.checkpoint(1, has_memory=False), make.checkpoint(10), make.checkpoint(20)]
    lost = [("lost", 20), ("lost", 10), ("lost", 1)]
    assert rungs(points) == [("restore", 20), ("restore", 10), *lost]
    assert rungs(points, on_lost=OnLost.FAIL) == [("restore", 20), ("restore", 10)]
    assert rungs(points, on_lost=OnLost.REPLAY) == [("restore", 20), ("restore", 10), ("replay", 1)]
    assert rungs(points, give_up_memory=True) == rungs(points, give_up_memory=True, on_lost=OnLost.FAIL) == lost
    assert rungs(points, give_up_memory=True, on_lost=OnLost.REPLAY) == [("replay", 1)]


def test_a_stream_that_has_to_be_reset_is_better_than_a_lost_memory(make) -> None:
    torn = make.call("torn", 9, state=CallState.TORN, attempts=())
    held = make.checkpoint(10, make.stream("torn", taken=5))
    points = [make.checkpoint(1, has_memory=False), make.checkpoint(5), held]
    assert rungs(points, [torn])[:3] == [("restore", 5), ("restore", 10), ("lost", 10)]


@pytest.mark.parametrize(("policy", "give_up"), list(itertools.product(OnLost, (False, True))))
def test_who_never_had_a_memory_lost_none(make, policy: OnLost, give_up: bool) -> None:
    points = [make.checkpoint(1, has_memory=False)]
    assert rungs(points, on_lost=policy, give_up_memory=give_up) == [("replay", 1)]


def test_a_memory_that_is_known_to_be_damaged_was_one(make) -> None:
    points = [make.checkpoint(1, has_memory=False)]
    assert rungs(points, had_memory=True) == [("lost", 1)]
    assert rungs(points, had_memory=True, on_lost=OnLost.FAIL) == []
    assert rungs(points, had_memory=True, on_lost=OnLost.REPLAY) == [("replay", 1)]


def test_an_agent_without_memory_is_expected_to_do_nothing_but_may_wait_on(make) -> None:
    redo = redo_set_of_lost(
        [
            make.call("answered", 5, "a"),
            make.call("sent", 6, "s", is_llm=False),
            make.call("asked", 7, "q", is_llm=False, state=CallState.INTENDED),
        ]
    )
    assert redo.pending == ()
    assert redo.match(make.key("a")) is None
    assert redo.match(make.key("s")) is None
    assert redo.match(make.key("q")) == "asked"
    assert not redo.diverged
    assert {way.value for way in Way} == {"restore", "replay", "lost"}
