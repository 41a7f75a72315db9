"""When a request that the provider refused is sent again within its call, as the providers' own SDKs judge it.

Only the head of a refusal is looked at, and only while nothing was delivered. What the provider says counts first
(`x-should-retry`, `retry-after-ms`, `retry-after`), then the status. Bounded by number and by time: the last refusal is
the agent's answer.
"""

import math
import random
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime

from torpor.config import Upstream
from torpor.core.clock import Clock
from torpor.gateway.request import Headers

RETRYABLE = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
NOT_TAKEN = frozenset({429, 503, 529})
"""Statuses that say that the request was not even begun: then an effect may be sent again as well."""

FIRST_SECONDS = 0.5
LONGEST_SECONDS = 8.0
JITTER = 0.25


class Backoff:
    """The pauses of one attempt of one call.

    Args:
        repeatable: a second sending is at worst a second bill.
        random_share: a number from 0 to 1, for the jitter.

    Attributes:
        retries: how many there were.
    """

    def __init__(
        self,
        upstream: Upstream,
        clock: Clock,
        *,
        repeatable: bool,
        random_share: Callable[[], float] = random.random,
    ) -> None:
        self.retries = 0
        self._upstream = upstream
        self._clock = clock
        self._repeatable = repeatable
        self._random_share = random_share
        self._began = clock.monotonic()

    def pause(self, status: int, headers: Headers) -> float | None:
        """How many seconds to wait before the request is sent again; None: this answer is the last."""
        said = {name.lower(): value.strip() for name, value in headers}
        if self.retries >= self._upstream.retries or not self._is_retryable(status, said):
            return None
        seconds = self._seconds_said(said)
        if seconds is None:
            grown = min(LONGEST_SECONDS, FIRST_SECONDS * 2**self.retries)
            seconds = grown * (1 - JITTER * self._random_share())
        if self._clock.monotonic() - self._began + seconds > self._upstream.retry_seconds:
            return None
        self.retries += 1
        return seconds

    def _is_retryable(self, status: int, said: Mapping[str, str]) -> bool:
        if status < 400:
            return False
        match said.get("x-should-retry", "").lower():
            case "true":
                return True
            case "false":
                return False
            case _:
                return status in (RETRYABLE if self._repeatable else NOT_TAKEN)

    def _seconds_said(self, said: Mapping[str, str]) -> float | None:
        """What the provider asks to wait; None if it says nothing that makes sense."""
        for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
            text = said.get(name, "")
            try:
                return _bounded(float(text) * unit)
            except ValueError:
                pass
        try:
            moment = parsedate_to_datetime(said.get("retry-after", ""))
            return _bounded(moment.timestamp() - self._clock.wall_ns() / 1e9)
        except (ValueError, OverflowError):
            return None


def _bounded(seconds: float) -> float:
    """A wait that can be waited: not negative, and a number."""
    if math.isnan(seconds):
        raise ValueError("not a number")
    return max(0.0, seconds)
