"""How patient a node is with an agent that only waits."""

import pytest

from torpor.core.idling import BACKOFF_MAX, FOR_OTHERS_TIMES, WORTH_TIMES, Linger


def test_it_is_more_patient_with_a_model_than_with_a_person() -> None:
    linger = Linger(5.0)
    assert linger.needed(left_seconds=None, for_others=False) == 5.0
    assert linger.needed(left_seconds=None, for_others=True) == 5.0 * FOR_OTHERS_TIMES


@pytest.mark.parametrize(("left", "sleeps"), [(5.0 + WORTH_TIMES * 2.0 - 0.1, False), (5.0 + WORTH_TIMES * 2.0, True)])
def test_it_does_not_sleep_for_less_than_that_is_worth(left: float, sleeps: bool) -> None:
    needed = Linger(5.0, cost_seconds=2.0).needed(left_seconds=left, for_others=False)
    assert needed == (5.0 if sleeps else None)


def test_short_sleeps_make_it_patient_up_to_a_bound_and_long_ones_impatient_again() -> None:
    linger = Linger(5.0, cost_seconds=1.0)
    for _ in range(20):
        linger.slept(1.0)
    assert linger.needed(left_seconds=None, for_others=False) == 5.0 * BACKOFF_MAX
    linger.slept(WORTH_TIMES)
    assert linger.needed(left_seconds=None, for_others=False) == 5.0 * BACKOFF_MAX / 2
    for _ in range(20):
        linger.slept(WORTH_TIMES)
    assert linger.needed(left_seconds=None, for_others=False) == 5.0
