"""Which 4 KiB pages of a memory image are new, where each one of them is stored, and against which page as a delta.

Pure: bytes in, plan out. Pages are compared by content wherever they stand in the file, because images are
    packed and every page that is newly in use shifts those behind it. A place is one number: pack << 32 |
    item.

A page's *base* is the page that it is stored as a delta of. Bases are no deltas themselves, so nothing is ever more
than one frame away; a page that is none is its own base, for later versions of it.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

from torpor.core.errors import Damaged
from torpor.snapshots.content_ids import PAGE_ID_BYTES
from torpor.snapshots.pack import HEAD_BYTES_MIN, PackIndex, PackRef, damaged

# 1 MiB: a step's changed pages resemble each other, and frames of 256 KiB store a sixth more of them.
PAGES_PER_FRAME = 256
PAGES_PER_PACK = 8192
BASES_PER_PACK_MIN = 1024
"""A pack that serves fewer pages of an image, or not a quarter of a small one, does not become a base of others."""
# One call of the interpreter's own code over all pages of an image would hold up the node's other threads for as long
# as it takes: 5 ms for 60,000 of them. Over so many it is a third of a millisecond.
_SLICE = 4096


class Extent(NamedTuple):
    """`count` consecutive pages of the file are `count` consecutive items of one pack."""

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    pack: int
    first: int

    @property
    def place(self) -> int:
        return self.pack << 32 | self.first


@dataclass(frozen=True, slots=True)
class PageIndex:
    """Every page of one stored image.

    Attributes:
        packs: what places refer to: those of the pages, and of their bases.
        ids: 16 bytes a page.
        bases: of each page the place of its base.
        needs: of each pack the numbers of the packs that its deltas need.
        debt: see PageWriter.
    """

    packs: tuple[PackRef, ...]
    ids: bytes
    places: "array[int]"
    bases: "array[int]"
    needs: tuple[tuple[int, ...], ...]
    debt: int = 0

    @property
    def pages(self) -> int:
        return len(self.places)

    def readable(self, is_present: Sequence[bool]) -> list[bool]:
        """Of which packs everything can be read, when some are no longer there."""
        return [
            is_present[pack] and all(is_present[needed] for needed in self.needs[pack])
            for pack in range(len(self.packs))
        ]

    def by_id(self, is_readable: Sequence[bool]) -> dict[bytes, int]:
        """Place of each page, without the packs that can't be read any more."""
        ids = self.split_ids()
        known: dict[bytes, int] = {}
        for at in range(0, len(ids), _SLICE):
            pairs = zip(ids[at : at + _SLICE], self.places[at : at + _SLICE], strict=True)
            known.update(pairs if all(is_readable) else [pair for pair in pairs if is_readable[pair[1] >> 32]])
        return known

    def bases_of_deltas(self) -> dict[int, int]:
        """The place of the base of each page that is a delta, by its own."""
        bases: dict[int, int] = {}
        for at in range(0, self.pages, _SLICE):
            pairs = zip(self.places[at : at + _SLICE], self.bases[at : at + _SLICE], strict=True)
            bases.update([pair for pair in pairs if pair[0] != pair[1]])
        return bases

    def split_ids(self) -> list[bytes]:
        return [self.ids[at : at + PAGE_ID_BYTES] for at in range(0, len(self.ids), PAGE_ID_BYTES)]


def count_pages(ref: PackRef) -> int:
    """How many pages a pack without deltas has, from the length of its head: an id for each, and eight bytes for each
    frame.
    """
    return (ref.head_bytes - HEAD_BYTES_MIN) * PAGES_PER_FRAME // (PAGE_ID_BYTES * PAGES_PER_FRAME + 8)


EMPTY_INDEX = PageIndex((), b"", array("Q"), array("Q"), ())


@dataclass(frozen=True, slots=True)
class PagePlan:
    """What to store.

    Attributes:
        new: page numbers in the file; those with a base come first.
        bases: the places of the bases of the first ones of `new`; the others have none.
        packs: first and end of the part of `new` that goes into each new pack.
        first_pack: the number of the first one of these.
    """

    ids: list[bytes]
    places: "array[int]"
    new: list[int]
    bases: list[int]
    packs: list[tuple[int, int]]
    first_pack: int


def plan_pages(
    ids: list[bytes],
    known: dict[bytes, int],
    first_pack: int,
    emptied: AbstractSet[int] = frozenset(),
    versions: "Versions | None" = None,
) -> PagePlan:
    """Find each page's place; new pages are added to `known`, so that equal ones are stored once.

    Args:
        emptied: numbers of packs of which the pages are stored again.
        versions: what the pages of the parent's image have for bases; without it there are no deltas.
    """
    places = places_of(ids, known)
    for page, place in enumerate(places) if emptied else ():
        if place is not None and place >> 32 in emptied:
            places[page] = None
            known.pop(ids[page], None)
    missing = [page for page, place in enumerate(places) if place is None]
    first: dict[bytes, int] = {}
    for page in missing:
        if ids[page] not in known:
            first.setdefault(ids[page], page)
    bases = versions.bases_of(ids, missing) if versions is not None else {}
    based = [page for page in first.values() if page in bases]
    new = based + [page for page in first.values() if page not in bases]
    packs = list(_packs(len(based), len(new)))
    for pack, (start, end) in enumerate(packs, first_pack):
        known.update(zip([ids[page] for page in new[start:end]], range(pack << 32, (pack << 32) + end), strict=False))
    for page in missing:
        places[page] = known[ids[page]]
    found = array("Q", [place for place in places if place is not None])
    return PagePlan(ids, found, new, [bases[page] for page in based], packs, first_pack)


def _packs(based: int, pages: int) -> Iterator[tuple[int, int]]:
    """Many pages without a base get packs of their own: what has no deltas may hold the bases of later ones."""
    ends = (based, pages) if based and pages - based >= BASES_PER_PACK_MIN else (pages,)
    start = 0
    for end in ends:
        for at in range(start, end, PAGES_PER_PACK):
            yield at, min(at + PAGES_PER_PACK, end)
        start = end


def places_of(ids: Sequence[bytes], known: dict[bytes, int]) -> list[int | None]:
    places: list[int | None] = []
    for at in range(0, len(ids), _SLICE):
        places += map(known.get, ids[at : at + _SLICE])
    return places


def frame_of(place: int) -> int:
    """A frame's number is a place without its low bits. In a pack with deltas and others it is about right."""
    return place // PAGES_PER_FRAME


class Versions:
    """Finds of which page of an earlier image a new page is probably a later version: the one in its place.

    An image is packed, so a place is counted from the page before that both images have.
    """

    def __init__(
        self, parent: PageIndex, holders: AbstractSet[int], afford: Callable[["Counter[int]"], AbstractSet[int]]
    ) -> None:
        """Args:
        holders: numbers of the packs whose pages may be bases.
        afford: says of which frames the bases are to be read, given how many pages each would serve.
        """
        self._bases = parent.bases
        self._holders = holders
        self._afford = afford
        self._positions: dict[bytes, int] = {}
        ids = parent.split_ids()
        for at in range(0, len(ids), _SLICE):
            self._positions.update(zip(ids[at : at + _SLICE], range(at, at + _SLICE), strict=False))

    def bases_of(self, ids: Sequence[bytes], missing: Sequence[int]) -> dict[int, int]:
        """The base of each page (by its number) that has one."""
        bases: dict[int, int] = {}
        at, last = 0, 0
        for page in missing:
            at += page - last
            last = page
            found = self._positions.get(ids[page])
            if found is not None:
                at = found  # It is stored again.
            elif page and (before := self._positions.get(ids[page - 1])) is not None:
                at = before + 1
            if at < len(self._bases) and self._bases[at] >> 32 in self._holders:
                bases[page] = self._bases[at]
        afforded = self._afford(Counter(map(frame_of, bases.values())))
        return {page: base for page, base in bases.items() if frame_of(base) in afforded}


def extents_of(places: Iterable[int]) -> Iterator[Extent]:
    """Run-length code places in file order."""
    start, count = 0, 0
    for place in places:
        if place == start + count:
            count += 1
            continue
        if count:
            yield Extent(count, start >> 32, start & 0xFFFFFFFF)
        start, count = place, 1
    if count:
        yield Extent(count, start >> 32, start & 0xFFFFFFFF)


def page_list_of(extents: Iterable[Extent], packs: Sequence[PackIndex]) -> bytes:
    """The ids of an image's pages in order; a tight loop, since a long session's image has thousands of extents."""
    ids, size = [pack.ids for pack in packs], PAGE_ID_BYTES
    return b"".join([ids[pack][size * first : size * (first + count)] for count, pack, first in extents])


def index_of_extents(extents: Iterable[Extent], packs: Sequence[PackIndex], debt: int = 0) -> PageIndex:
    """Rebuild the index of a stored image from its extents and its packs' indexes.

    Raises:
        Damaged: snapshot_damaged.
    """
    numbers = {pack.ref.name: number for number, pack in enumerate(packs)}
    extents = list(extents)
    held = {extent.pack for extent in extents}
    all_bases = {number: bases_in(packs[number], number, numbers) for number in held}
    ids, places, bases = bytearray(), array("Q"), array("Q")
    for extent in extents:
        ids += packs[extent.pack].ids_of(extent.first, extent.count)
        places.extend(range(extent.place, extent.place + extent.count))
        bases += all_bases[extent.pack][extent.first : extent.first + extent.count]
    needs = tuple(tuple(base_numbers(pack, numbers)) if number in held else () for number, pack in enumerate(packs))
    return PageIndex(tuple(pack.ref for pack in packs), bytes(ids), places, bases, needs, debt)


def bases_in(pack: PackIndex, number: int, numbers: dict[bytes, int]) -> "array[int]":
    """The place of the base of each page of a pack.

    Raises:
        Damaged: snapshot_damaged, a pack that it needs is not among `numbers` (by name).
    """
    bases = array("Q", range(number << 32, (number << 32) + pack.items))
    needed = base_numbers(pack, numbers)
    for frame in pack.frames:
        if frame.is_delta:
            found = [needed[base] << 32 | item for base, item in pack.bases_of(frame)]
            bases[frame.first_item : frame.first_item + frame.items] = array("Q", found)
    return bases


def base_numbers(pack: PackIndex, numbers: dict[bytes, int]) -> list[int]:
    """Raises Damaged: snapshot_damaged."""
    if not numbers.keys() >= set(pack.base_packs):
        raise _without_bases(pack)
    return [numbers[name] for name in pack.base_packs]


def _without_bases(pack: PackIndex) -> Damaged:
    return damaged(pack.ref.key, "a pack that its deltas need is not one of the snapshot's")
