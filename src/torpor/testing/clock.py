"""A clock that stands still until a test moves it."""


class FakeClock:
    """Wall and monotonic time that move together, only by `advance`; `jump` moves the wall alone."""

    def __init__(self, *, wall_ns: int = 1_700_000_000_000_000_000, monotonic: float = 1000.0) -> None:
        self._wall_ns = wall_ns
        self._monotonic = monotonic

    def wall_ns(self) -> int:
        return self._wall_ns

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError("monotonic time never falls; use jump for the wall")
        self._monotonic += seconds
        self._wall_ns += int(seconds * 1_000_000_000)

    def jump(self, seconds: float) -> None:
        """Set the wall clock off, as a suspended laptop or an administrator does."""
        self._wall_ns += int(seconds * 1_000_000_000)
