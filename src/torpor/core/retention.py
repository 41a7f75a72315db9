"""Which checkpoints of a session are kept, and why. Pure; applied by the node after commits and by `torpor collect`.

Time is looked at only through the checkpoints' own time stamps, never through a clock: so the answer stays the same
until there is a new checkpoint, thinning twice is thinning once, and thinning after every commit ends where thinning
once at the end does.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

HOUR_NS = 3600 * 10**9
DAY_NS = 24 * HOUR_NS


class Reason(StrEnum):
    """Why a checkpoint is kept; of several the first one of this list."""

    PINNED = "pinned"
    FORKED = "forked"
    """Another session came from it."""
    FIRST = "first"
    """The ladder's last rung: a fresh boot with the files as they were given."""
    IN_USE = "in use"
    """A restore would take it, or the living sandbox came from it."""
    LAST = "last"
    HOURLY = "hourly"
    DAILY = "daily"
    DAMAGED = "damaged"
    """It does not restore, but is younger than some that do: a person may mend it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPolicy:
    """How many are kept.

    Attributes:
        keep_last: the newest ones; at least 1.
        keep_hourly: so many hours that have a checkpoint keep their newest one; hours and days are UTC's.
        keep_daily: the same for days.
    """

    keep_last: int
    keep_hourly: int
    keep_daily: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPoint:
    """What the policy looks at. A higher number is a newer checkpoint, whatever the clock said."""

    number: int
    wall_ns: int
    damaged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPlan:
    """Every checkpoint is in one of the two."""

    kept: Mapping[int, Reason]
    forgotten: tuple[int, ...]


def plan_retention(
    points: Iterable[RetentionPoint],
    policy: RetentionPolicy,
    *,
    pinned: Collection[int] = (),
    forked: Collection[int] = (),
    in_use: Collection[int] = (),
) -> RetentionPlan:
    """Decide every checkpoint of one session.

    Args:
        in_use: numbers that must stay whatever the policy says: the newest one that is `sure_to_restore`, and the one
            that a living sandbox came from.
    """
    newest_first = sorted(points, key=lambda point: point.number, reverse=True)
    intact = [point for point in newest_first if not point.damaged]
    kept: dict[int, Reason] = {}
    numbers = {point.number for point in newest_first}

    def keep(wanted: Iterable[int], reason: Reason) -> None:
        for number in wanted:
            if number in numbers:
                kept.setdefault(number, reason)

    keep(pinned, Reason.PINNED)
    keep(forked, Reason.FORKED)
    keep((point.number for point in intact[-1:]), Reason.FIRST)
    keep(in_use, Reason.IN_USE)
    last = intact[: max(1, policy.keep_last)]
    keep((point.number for point in last), Reason.LAST)
    keep(_newest_of_each(intact, HOUR_NS, policy.keep_hourly), Reason.HOURLY)
    keep(_newest_of_each(intact, DAY_NS, policy.keep_daily), Reason.DAILY)
    # With fewer intact ones than are to be kept, everything that is damaged stays as well.
    oldest_kept = last[-1].number if len(last) >= policy.keep_last else -1
    keep((point.number for point in newest_first if point.damaged and point.number > oldest_kept), Reason.DAMAGED)
    forgotten = sorted(number for number in numbers if number not in kept)
    return RetentionPlan(kept=kept, forgotten=tuple(forgotten))


def _newest_of_each(newest_first: Sequence[RetentionPoint], length_ns: int, count: int) -> list[int]:
    """The newest checkpoint of each stretch of time, for as many stretches as asked for."""
    found: dict[int, int] = {}
    for point in newest_first:
        if len(found) == count:
            break
        found.setdefault(point.wall_ns // length_ns, point.number)
    return list(found.values())
