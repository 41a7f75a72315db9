"""How often turns are checkpointed: within the share, never starved, and everything that is hidden is free."""

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.core.errors import InvalidInput
from torpor.core.pacing import EVERY_TURN_PPM, SAVED_SECONDS, SHARE_PPM, Pace, parse_share, share_text

GRAIN = 1 / 1024
"""Times are multiples of a power of two, so that sums are exact."""


def seconds(most: float) -> st.SearchStrategy[float]:
    return st.integers(0, int(most / GRAIN)).map(lambda count: count * GRAIN)


@dataclass(frozen=True)
class Turn:
    """`wait` seconds pass, then a turn begins whose checkpoint would cost so much; or somebody asks for one."""

    wait: float
    cost: float
    is_asked: bool = False
    is_new_life: bool = False


@dataclass(frozen=True)
class Made:
    at: float
    end: float
    is_turn: bool

    @property
    def cost(self) -> float:
        return self.end - self.at


turns = st.lists(
    st.builds(Turn, wait=seconds(200), cost=seconds(30), is_asked=st.booleans(), is_new_life=st.booleans()),
    max_size=25,
)


def play(pace: Pace, plan: list[Turn]) -> list[Made]:
    """Every checkpoint of a session, one after the other; `is_turn` leaves out the first of each life."""
    now, made = pace.at, list[Made]()
    for turn in plan:
        now += turn.wait
        if turn.is_new_life:
            pace.begin_life()
        if not turn.is_asked and not pace.due(now):
            continue
        was_first = pace.is_first
        if not turn.is_asked:
            pace.begun()
        pace.charge(now, now + turn.cost)
        made.append(Made(now, now + turn.cost, not turn.is_asked and not was_first))
        now += turn.cost
    return made


@given(turns, st.integers(1, 1_000_000))
def test_in_any_stretch_of_time_turns_cost_no_more_than_the_share(plan: list[Turn], share_ppm: int) -> None:
    made = [one for one in play(Pace(share_ppm, 0.0), plan) if one.is_turn]
    share = share_ppm / 1_000_000
    for first, last in itertools.combinations_with_replacement(range(len(made)), 2):
        stretch = made[first : last + 1]
        dearest = max(one.cost for one in stretch)
        length = stretch[-1].end - stretch[0].at
        assert sum(one.cost for one in stretch) <= share * (length + SAVED_SECONDS) + dearest + 1e-6


@given(turns, st.integers(1, 1_000_000))
def test_what_is_owed_is_earned_in_time_and_then_the_next_turn_is_checkpointed(
    plan: list[Turn], share_ppm: int
) -> None:
    pace = Pace(share_ppm, 0.0)
    play(pace, plan)
    pace.begun()
    now = pace.at
    owed = pace.owed_seconds(now)
    assert owed <= sum(turn.cost for turn in plan)
    assert pace.due(now + owed * 1_000_000 / share_ppm + 1e-3)


@given(turns)
def test_the_first_turn_of_every_life_is_checkpointed_whatever_is_owed(plan: list[Turn]) -> None:
    pace = Pace(SHARE_PPM, 0.0)
    play(pace, plan)
    pace.charge(pace.at, pace.at + 1000)
    pace.begin_life()
    assert pace.due(pace.at)
    pace.begun()
    assert not pace.due(pace.at)


@given(turns)
def test_without_a_limit_every_turn_is_checkpointed(plan: list[Turn]) -> None:
    unlimited = [turn for turn in plan if not turn.is_asked]
    assert len(play(Pace(EVERY_TURN_PPM, 0.0), unlimited)) == len(unlimited)


@given(st.lists(seconds(100), max_size=20))
def test_checkpoints_that_are_hidden_behind_the_model_skip_no_turn(waits: list[float]) -> None:
    plan = [Turn(wait, 0.0) for wait in waits]
    assert len(play(Pace(1, 0.0), plan)) == len(plan)


def test_a_big_process_with_quick_turns_skips_most_of_them() -> None:
    """A second lost for each turn of three: five percent pays for one in twenty seconds."""
    made = play(Pace(SHARE_PPM, 0.0), [Turn(wait=2.0, cost=1.0)] * 600)
    span = made[-1].end
    assert span > 1000
    assert sum(one.cost for one in made) <= 0.05 * span + 1
    gaps = [later.at - one.at for one, later in itertools.pairwise(made)]
    assert max(gaps) <= 20 + 3


def test_a_quiet_hour_saves_up_for_a_few_turns_only() -> None:
    pace = Pace(SHARE_PPM, 0.0)
    pace.begun()
    made = play(pace, [Turn(wait=3600.0, cost=1.0), *[Turn(wait=1.0, cost=1.0)] * 50])
    early = [one for one in made if one.at < 3610]
    assert len(early) == 4  # Three seconds were saved, and what is left of them after three lets a fourth begin.


def test_calls_that_wait_for_one_checkpoint_together_lose_that_time_once() -> None:
    pace = Pace(SHARE_PPM, 0.0)
    assert pace.charge(10.0, 12.0) == 2.0
    assert pace.charge(11.0, 12.0) == 0.0
    assert pace.charge(11.5, 13.0) == 1.0
    assert pace.owed_seconds(13.0) == pytest.approx(3.0 - 0.05 * 13.0)


def test_a_turn_that_was_skipped_is_not_the_first_of_its_life() -> None:
    pace = Pace(SHARE_PPM, 0.0)
    pace.begun()
    pace.charge(0.0, 10.0)
    assert not pace.due(10.0)
    assert pace.due(10.0 + 9.5 / 0.05 + 0.001)


@pytest.mark.parametrize(
    ("text", "share_ppm"), [("5%", 50_000), ("0.5%", 5_000), ("100%", 1_000_000), ("always", 0), ("0", 0)]
)
def test_a_share_is_a_percentage_or_always(text: str, share_ppm: int) -> None:
    assert parse_share(text) == share_ppm


@pytest.mark.parametrize("text", ["5", "", "%", "0%", "-1%", "101%", "nan%", "inf%", "5%%", "5 percent", "never"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_share(text)
    assert refused.value.code == "share_malformed"


@given(st.integers(0, 1_000_000))
def test_a_share_is_read_as_it_is_written(share_ppm: int) -> None:
    assert parse_share(share_text(share_ppm)) == share_ppm
