"""Which 4 KiB pages of a memory image are new, and where each one of them is stored.

Pure: bytes in, plan out. Pages are compared by content wherever they stand in the file, because images are
    packed and every page that is newly in use shifts those behind it. A place is one number: pack << 32 |
    item.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torpor.snapshots.content_ids import PAGE_ID_BYTES
from torpor.snapshots.pack import HEAD_BYTES_MIN, PackIndex, PackRef

# 1 MiB: a step's changed pages resemble each other, and frames of 256 KiB store a sixth more of them.
PAGES_PER_FRAME = 256
PAGES_PER_PACK = 8192
# A restore decompresses whole frames, and survivors of old images lie in ever sparser ones: after 100 steps
# of a 78 MB agent it would read six times the frames it needs. Above twice the least number of frames the
# sparsest are emptied by storing their pages again, some at each save, which adds about a fifth to what long
# sessions store.
FRAMES_OVER_IDEAL_MAX = 2.0
PAGES_MOVED_PER_SAVE_MAX = 512
# One call of the interpreter's own code over all pages of an image would hold up the node's other threads for as long
# as it takes: 5 ms for 60,000 of them. Over so many it is a third of a millisecond.
_SLICE = 4096
_FRAMES_SLACK = (
    8  # Emptied beyond the limit: the pages moved make new frames, and the next save shall find enough room.
)


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
    """Every page of one stored image: `ids` is 16 bytes a page, `places` refer to `packs`."""

    packs: tuple[PackRef, ...]
    ids: bytes
    places: "array[int]"

    @property
    def pages(self) -> int:
        return len(self.places)

    def by_id(self, is_present: Sequence[bool]) -> dict[bytes, int]:
        """Place of each page, without the packs that are no longer there."""
        step = PAGE_ID_BYTES
        ids = [self.ids[at : at + step] for at in range(0, len(self.ids), step)]
        known: dict[bytes, int] = {}
        for at in range(0, len(ids), _SLICE):
            pairs = zip(ids[at : at + _SLICE], self.places[at : at + _SLICE], strict=True)
            known.update(pairs if all(is_present) else [pair for pair in pairs if is_present[pair[1] >> 32]])
        return known


def count_pages(ref: PackRef) -> int:
    """How many pages a page pack has, from the length of its head: an id for each, and eight bytes for each frame."""
    return (ref.head_bytes - HEAD_BYTES_MIN) * PAGES_PER_FRAME // (PAGE_ID_BYTES * PAGES_PER_FRAME + 8)


EMPTY_INDEX = PageIndex((), b"", array("Q"))


@dataclass(frozen=True, slots=True)
class PagePlan:
    """What to store: `new` are page numbers in the file; the k-th goes to item k % PAGES_PER_PACK of new pack
    k // PAGES_PER_PACK, whose number is `first_pack` higher."""

    ids: list[bytes]
    places: "array[int]"
    new: list[int]
    first_pack: int


def plan_pages(ids: list[bytes], known: dict[bytes, int], first_pack: int) -> PagePlan:
    """Find each page's place; new pages are added to `known`, so that equal ones are stored once."""
    places: list[int | None] = []
    for at in range(0, len(ids), _SLICE):
        places += map(known.get, ids[at : at + _SLICE])
    emptied = _frames_to_empty(places)
    if emptied:
        for page, place in enumerate(places):
            if place is not None and place // PAGES_PER_FRAME in emptied:
                places[page] = None
                known.pop(ids[page], None)
    new: list[int] = []
    for page in _missing(places):
        page_id = ids[page]
        if page_id not in known:
            pack, item = divmod(len(new), PAGES_PER_PACK)
            known[page_id] = first_pack + pack << 32 | item
            new.append(page)
        places[page] = known[page_id]
    return PagePlan(ids, array("Q", [place for place in places if place is not None]), new, first_pack)


def _missing(places: list[int | None]) -> list[int]:
    return [page for page, place in enumerate(places) if place is None]


def _frames_to_empty(places: list[int | None]) -> set[int]:
    """The sparsest frames, once the image is spread over too many. A frame's number is a place without its
    low bits.
    """
    kept = list({place for place in places if place is not None})
    use = Counter[int]()
    for at in range(0, len(kept), _SLICE):
        use.update([place // PAGES_PER_FRAME for place in kept[at : at + _SLICE]])
    excess = len(use) - int(FRAMES_OVER_IDEAL_MAX * (len(kept) / PAGES_PER_FRAME + 1))
    emptied, budget = set[int](), PAGES_MOVED_PER_SAVE_MAX
    if excess > 0:
        sparsest = sorted((pages, frame) for frame, pages in use.items())
        for pages, frame in sparsest[: excess + _FRAMES_SLACK]:
            budget -= pages
            if budget < 0:
                break
            emptied.add(frame)
    return emptied


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


def index_of_extents(extents: Iterable[Extent], packs: Sequence[PackIndex]) -> PageIndex:
    """Rebuild the index of a stored image from its extents and its packs' indexes."""
    ids, places = bytearray(), array("Q")
    for extent in extents:
        ids += packs[extent.pack].ids_of(extent.first, extent.count)
        places.extend(range(extent.place, extent.place + extent.count))
    return PageIndex(tuple(pack.ref for pack in packs), bytes(ids), places)
