"""Which frames a restore opens, what their pages are wanted for, and when a delta can be opened. Pure but for counting.

A delta is opened once its bases were fed to it, by the frames that hold them, and its own bytes are there. Deltas are
stored in the order of their bases, and frames are opened in theirs: so only a few wait at a time.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from torpor.snapshots.content_ids import PAGE_BYTES
from torpor.snapshots.pack import Frame, PackIndex, damaged
from torpor.snapshots.pages import Extent, base_numbers


class Run(NamedTuple):
    """`count` pages of a frame, from its page `first`, go to the file's page `target`."""

    target: int
    first: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


class Feed(NamedTuple):
    """`count` pages of a frame, from its page `first`, are the bases of a delta's pages from `at` on."""

    delta: "Delta"
    at: int
    first: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclass(slots=True)
class FrameUse:
    """A frame without deltas, and what it is wanted for."""

    frame: Frame
    runs: list[Run] = field(default_factory=list[Run])
    feeds: list[Feed] = field(default_factory=list[Feed])


class Delta:
    """A delta frame on its way; thread-safe.

    Attributes:
        base: the bytes of its bases, as far as they were fed.
        stored: its own, when they are there.
    """

    __slots__ = ("_lock", "_missing", "base", "frame", "pack", "runs", "stored")

    def __init__(self, pack: PackIndex, frame: Frame) -> None:
        self.pack = pack
        self.frame = frame
        self.runs: list[Run] = []
        self.base = bytearray()
        self.stored = memoryview(b"")
        self._missing = frame.items + 1
        self._lock = threading.Lock()

    def feed(self, feed: Feed, raw: memoryview) -> bool:
        """Take pages of an opened frame; whether nothing is missing now."""
        with self._lock:
            if not self.base:
                self.base = bytearray(self.frame.items * PAGE_BYTES)
            piece = raw[feed.first * PAGE_BYTES : (feed.first + feed.count) * PAGE_BYTES]
            self.base[feed.at * PAGE_BYTES : (feed.at + feed.count) * PAGE_BYTES] = piece
            self._missing -= feed.count
            return not self._missing

    def fetched(self, stored: memoryview) -> bool:
        """Take its own bytes; whether nothing is missing now."""
        with self._lock:
            self.stored = stored
            self._missing -= 1
            return not self._missing

    def open(self) -> memoryview:
        """Its pages; the bases are let go.

        Raises:
            Damaged: snapshot_damaged.
        """
        base, self.base = self.base, bytearray()
        return memoryview(self.pack.open_frame(self.frame, self.stored, base))


Uses: TypeAlias = dict[tuple[int, int], FrameUse]
Deltas: TypeAlias = dict[tuple[int, int], Delta]
"""By the number of the pack and that of the frame in it."""


def plan_frames(extents: Iterable[Extent], packs: Sequence[PackIndex]) -> tuple[Uses, Deltas]:
    """Frames without deltas, and those that are deltas.

    Raises:
        Damaged: snapshot_damaged.
    """
    uses: Uses = {}
    deltas: Deltas = {}
    target = 0
    for extent in extents:
        pack = packs[extent.pack]
        first, end = extent.first, extent.first + extent.count
        while first < end:
            frame = pack.frames[pack.frame_of(first)]
            key = extent.pack, frame.number
            count = min(end, frame.first_item + frame.items) - first
            holder = uses.get(key) or deltas.get(key)
            if holder is None:
                if frame.is_delta:
                    holder = deltas[key] = Delta(pack, frame)
                else:
                    holder = uses[key] = FrameUse(frame)
            holder.runs.append(Run(target, first - frame.first_item, count))
            first += count
            target += count
    numbers = {pack.ref.name: number for number, pack in enumerate(packs)}
    for (number, _), delta in deltas.items():
        _add_feeds(uses, delta, base_numbers(packs[number], numbers), packs)
    return uses, deltas


def _add_feeds(uses: Uses, delta: Delta, needed: Sequence[int], packs: Sequence[PackIndex]) -> None:
    """Have the bases of a delta fed to it. A loop over its pages: what can be is done once for many of them."""
    bases = delta.pack.bases_of(delta.frame)
    at = 0
    while at < len(bases):
        base, item = bases[at]
        pack = packs[needed[base]]
        frame = pack.frames[pack.frame_of(item)]
        if frame.is_delta:
            raise damaged(delta.pack.ref.key, f"frame {delta.frame.number} is a delta of deltas")
        use = uses.setdefault((needed[base], frame.number), FrameUse(frame))
        first, end = frame.first_item, frame.first_item + frame.items
        while at < len(bases) and bases[at][0] == base and first <= bases[at][1] < end:
            start, item = at, bases[at][1]
            at += 1
            while at < len(bases) and bases[at] == (base, item + at - start) and item + at - start < end:
                at += 1
            use.feeds.append(Feed(delta, start, item - first, at - start))
