"""An agent that failed begins again before its failing turn, a bounded number of times without progress."""

import pytest

from torpor.core.branch import Timeline
from torpor.core.errors import InvalidInput
from torpor.core.restart import (
    Restart,
    failing_turn,
    parse_restart,
    redo_set_after_restarts,
    restarts_in_a_row,
    still_restore,
    why_not,
)


def restart(seq: int, failed_seq: int, incarnation: int = 1) -> Restart:
    return Restart(incarnation=incarnation, seq=seq, failed_seq=failed_seq)


@pytest.mark.parametrize(("text", "number"), [("no", 0), ("on-failure", 3), ("on-failure:7", 7), ("on-failure:0", 0)])
def test_the_policy_is_read(text: str, number: int) -> None:
    assert parse_restart(text) == number


@pytest.mark.parametrize(
    "text", ["", "always", "on-failure:", "on-failure:-1", "on-failure:²", "no:3", "on-failure:1.5"]
)
def test_what_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_restart(text)
    assert refused.value.code == "restart_malformed"


def test_the_model_is_asked_anew_in_the_failing_turn_and_only_there(make) -> None:
    calls = [
        make.call("first", 10, "a"),
        make.call("note", 12, "n", is_llm=False),
        make.call("second", 20, "b"),
        make.call("sent", 22, "s", is_llm=False),
    ]
    assert failing_turn(calls, []) == 20
    failed = restart(30, 20)
    redo = redo_set_after_restarts(calls, make.checkpoint(5), [failed], Timeline())
    assert redo.pending == ("first", "note")
    assert redo.match(make.key("a")) == "first"
    assert redo.match(make.key("n")) == "note"
    assert redo.match(make.key("b")) is None
    assert not redo.diverged
    assert redo.match(make.key("s")) == "sent"
    # The turn that fails next is the one that was begun anew.
    again = [*calls, make.call("third", 35, "b")]
    assert failing_turn(again, [failed]) == 35
    assert redo_set_after_restarts(again, make.checkpoint(5), [failed, restart(40, 35)], Timeline()).pending == (
        "first",
        "note",
    )


def test_no_cut_of_a_turn_that_failed_restores(make) -> None:
    points = [make.checkpoint(seq) for seq in (5, 19, 20, 29, 31)]
    assert [point.seq for point in still_restore(points, [restart(30, 20)])] == [5, 19, 31]


def test_without_a_model_call_nothing_is_forgotten(make) -> None:
    calls = [make.call("note", 12, "n", is_llm=False)]
    assert failing_turn(calls, []) is None
    redo = redo_set_after_restarts(calls, make.checkpoint(5), [restart(30, 30)], Timeline())
    assert redo.pending == ("note",)


def test_progress_makes_the_count_begin_anew(make) -> None:
    first = [make.call("one", 10, "a")]
    failed = [restart(20, 10)]
    same = [*first, make.call("one again", 25, "a")]
    assert restarts_in_a_row(first, failed) == 1
    assert restarts_in_a_row(same, failed) == 1
    assert restarts_in_a_row([*same, make.call("two", 28, "b")], failed) == 0
    twice = [*failed, restart(30, 25)]
    assert restarts_in_a_row([*same, make.call("one, third", 35, "a")], twice) == 2


def test_who_begins_again(make) -> None:
    calls = [make.call("one", 10, "a")]
    assert why_not(1, 1, calls, []) is None
    assert why_not(137, 1, calls, []) is None
    assert why_not(0, 1, calls, []) == why_not(1, 0, calls, []) == ""
    assert why_not(143, 1, calls, []) == "it was asked to end"
    assert why_not(1, 1, calls, [restart(20, 10)]) == "it failed again after 1 restarts"
