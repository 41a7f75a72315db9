"""Two views of where a session has been (RECOVERY 5.1, 5.2 and 5.6).

The `ContextTree` is what people see: context events with parents, and a cursor on the present path. A call hangs on
the cursor, its end hangs on the call. The `Timeline` is what recovery goes by: which stretches of the log belong to
the session since its rewinds. They are not the same: a divergence makes a side path in the tree, and its calls were
made all the same, so they stay on the timeline and are never paid for twice. Only a rewind takes calls off it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


class ContextTree:
    """Parents of the calls of one session, by the seq of their call.intended, and the cursor."""

    __slots__ = ("_parents", "cursor")

    def __init__(self, root: int) -> None:
        self._parents: dict[int, int | None] = {root: None}
        self.cursor = root

    def hang(self, seq: int) -> int:
        """A call was intended at `seq`: its parent is the cursor, which moves onto it."""
        parent = self.cursor
        self.load(seq, parent)
        self.cursor = seq
        return parent

    def load(self, seq: int, parent: int) -> None:
        """Enter an event of the log. Parents are older than their children, so no cycle can arise."""
        if parent not in self._parents or parent >= seq:
            raise ValueError(f"cannot hang event {seq}: its parent {parent} is not an older context event")
        self._parents[seq] = parent

    def reach(self, seq: int) -> None:
        """A request matched the call intended at `seq`: the cursor moves onto it.

        It stays when the call lies behind it already, or a parallel agent that repeats its calls in another order would
        leave its own path.
        """
        if seq not in self._parents:
            raise ValueError(f"cannot move the cursor to event {seq}: it is not a context event of this session")
        if seq not in self.ancestors():
            self.cursor = seq

    def rewind(self, seq: int) -> None:
        """The session goes back to a cut whose cursor was `seq`."""
        if seq not in self._parents:
            raise ValueError(f"cannot rewind to event {seq}: it is not a context event of this session")
        self.cursor = seq

    def ancestors(self) -> list[int]:
        """The present path, the cursor first and the root last."""
        return list(self._path(self.cursor))

    def _path(self, seq: int) -> Iterator[int]:
        at: int | None = seq
        while at is not None:
            yield at
            at = self._parents[at]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Events with first <= seq <= last; None has no end."""

    first: int
    last: int | None

    def holds(self, seq: int) -> bool:
        return self.first <= seq and (self.last is None or seq <= self.last)


@dataclass(frozen=True, slots=True)
class Timeline:
    """The stretches of the log that are the session's past, oldest first."""

    stretches: tuple[Stretch, ...] = (Stretch(first=0, last=None),)

    def rewound(self, *, to_seq: int, at_seq: int) -> "Timeline":
        """What a rewind to the cut at `to_seq` leaves, when it was logged at `at_seq`."""
        if not self.holds(to_seq) or to_seq >= at_seq:
            raise ValueError(f"cannot rewind to {to_seq} at {at_seq}: it is not in the past")
        kept = [
            Stretch(first=piece.first, last=to_seq if piece.holds(to_seq) else piece.last)
            for piece in self.stretches
            if piece.first <= to_seq
        ]
        return Timeline((*kept, Stretch(first=at_seq, last=None)))

    def holds(self, seq: int) -> bool:
        return any(piece.holds(seq) for piece in self.stretches)

    def after(self, cut_seq: int, seq: int) -> bool:
        """Whether this timeline did `seq` after the cut at `cut_seq`."""
        return seq > cut_seq and self.holds(seq)

    def begun_by(self, cut_seq: int) -> bool:
        """Whether the present stretch had begun at that cut: no rewind lies between the cut and now."""
        return self.stretches[-1].first <= cut_seq

    @classmethod
    def of_rewinds(cls, rewinds: Iterable[tuple[int, int]]) -> "Timeline":
        """The timeline after rewinds, each (to_seq, at_seq), in the order of the log."""
        timeline = cls()
        for to_seq, at_seq in rewinds:
            timeline = timeline.rewound(to_seq=to_seq, at_seq=at_seq)
        return timeline
