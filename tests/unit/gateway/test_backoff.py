"""Which refusals are sent again, and after how long."""

from email.utils import formatdate

import pytest

from torpor.config import KeySource, Upstream
from torpor.gateway.backoff import NOT_TAKEN, RETRYABLE, Backoff
from torpor.testing.clock import FakeClock


def backoff(
    clock: FakeClock | None = None, *, retries: int = 4, seconds: float = 60, repeatable: bool = True, share: float = 0
) -> Backoff:
    upstream = Upstream(
        name="u",
        family="openai",
        base_url="http://x",
        key=KeySource(),
        bearer=True,
        retries=retries,
        retry_seconds=seconds,
    )
    return Backoff(upstream, clock or FakeClock(), repeatable=repeatable, random_share=lambda: share)


def test_pauses_double_up_to_a_cap_and_end_with_the_number_of_retries() -> None:
    waits = backoff(retries=6)
    assert [waits.pause(500, ()) for _ in range(7)] == [0.5, 1, 2, 4, 8, 8, None]
    assert waits.retries == 6


def test_jitter_makes_a_pause_shorter_by_a_quarter_at_most() -> None:
    assert backoff(share=1.0).pause(500, ()) == 0.375


@pytest.mark.parametrize("status", [200, 204, 301, 400, 401, 403, 404, 422, 501])
def test_what_is_no_refusal_for_now_is_final(status: int) -> None:
    assert backoff().pause(status, ()) is None


@pytest.mark.parametrize("status", sorted(RETRYABLE))
def test_what_providers_retry_is_retried(status: int) -> None:
    assert backoff().pause(status, ()) == 0.5
    # An effect is repeated only if it was not begun.
    assert (backoff(repeatable=False).pause(status, ()) is not None) == (status in NOT_TAKEN)


def test_the_providers_word_is_above_the_status() -> None:
    assert backoff().pause(529, (("X-Should-Retry", "false"),)) is None
    assert backoff(repeatable=False).pause(400, (("x-should-retry", "True"),)) == 0.5
    assert backoff().pause(200, (("x-should-retry", "true"),)) is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ((("retry-after", "3"),), 3.0),
        ((("Retry-After-Ms", "250"), ("retry-after", "3")), 0.25),
        ((("retry-after-ms", "soon"), ("retry-after", "1.5")), 1.5),
        ((("retry-after", "-4"),), 0.0),
        ((("retry-after", "later"),), 0.5),
        ((("retry-after", "nan"),), 0.5),
        ((("retry-after", "inf"),), None),
        ((("retry-after", "61"),), None),
    ],
)
def test_the_pause_is_the_one_that_the_provider_asks_for(
    headers: tuple[tuple[str, str], ...], seconds: float | None
) -> None:
    assert backoff(share=1.0 if seconds != 0.5 else 0).pause(429, headers) == seconds


def test_a_date_is_a_pause_too() -> None:
    clock = FakeClock()
    date = formatdate(clock.wall_ns() / 1e9 + 7, usegmt=True)
    assert backoff(clock).pause(503, (("retry-after", date),)) == pytest.approx(7, abs=1)


def test_no_pause_ends_after_the_whole_time_that_is_allowed() -> None:
    clock = FakeClock()
    waits = backoff(clock, seconds=10)
    assert waits.pause(500, ()) == 0.5
    clock.advance(9.5)
    assert waits.pause(500, ()) is None
