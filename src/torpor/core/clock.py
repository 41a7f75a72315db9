"""Time as an argument: wall time for records, monotonic time for deadlines. The only reader of the machine's clock."""

import time
from typing import Protocol


class Clock(Protocol):
    def wall_ns(self) -> int:
        """Nanoseconds since 1970, for records; may jump."""
        ...

    def monotonic(self) -> float:
        """Seconds that only rise, for deadlines; their zero means nothing."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def wall_ns(self) -> int:
        return time.time_ns()

    def monotonic(self) -> float:
        return time.monotonic()
