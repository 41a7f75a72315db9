"""When a session whose agent only waits is put to sleep. Pure.

It has to have been idle for `linger` seconds; longer if a model is asked, whose answers mostly come soon; and it stays
awake for a time that is known and too near. To sleep costs what saving and restoring take. A sleep that was too short
to be worth that doubles the linger, a long one halves it again: so a session that is woken all the time stays awake.
"""

from dataclasses import dataclass

LINGER_SECONDS = 5.0
PAUSED_SECONDS = 30.0
READY_SECONDS = 300.0
FOR_OTHERS_TIMES = 4
"""So much longer than `linger` when an answer is on its way from somewhere else."""
WORTH_TIMES = 5
"""A sleep is worth its cost if it lasts so many times as long."""
COST_SECONDS = 1.0
"""Of saving and restoring, until both have been measured."""
BACKOFF_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """How long a waiting session stays in each state before the next, which costs less and wakes more slowly.

    Attributes:
        linger_seconds: idle, before it is put to sleep; None: it never is, unless somebody asks.
        paused_seconds: its sandbox stands still in memory.
        ready_seconds: its image, and an empty sandbox for it, are in memory.
    """

    linger_seconds: float | None = LINGER_SECONDS
    paused_seconds: float = PAUSED_SECONDS
    ready_seconds: float = READY_SECONDS


@dataclass(slots=True)
class Linger:
    """One session's patience."""

    seconds: float
    cost_seconds: float = COST_SECONDS
    backoff: int = 1

    def needed(self, *, left_seconds: float | None, for_others: bool) -> float | None:
        """How long it has to be idle before it sleeps; None: what it waits for comes too soon for that.

        Args:
            left_seconds: until it goes on at the latest; None: nobody knows.
            for_others: an answer is on its way from somewhere else.
        """
        needed = self.seconds * self.backoff * (FOR_OTHERS_TIMES if for_others else 1)
        if left_seconds is not None and left_seconds < needed + WORTH_TIMES * self.cost_seconds:
            return None
        return needed

    def slept(self, seconds: float) -> None:
        """It woke after so long."""
        was_worth_it = seconds >= WORTH_TIMES * self.cost_seconds
        self.backoff = max(1, self.backoff // 2) if was_worth_it else min(BACKOFF_MAX, self.backoff * 2)
