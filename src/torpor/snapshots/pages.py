"""Which 4 KiB pages of a memory image are new, and where each one of them is stored.

Pure: bytes in, plan out. Pages are compared by content wherever they stand in the file, because images are
    packed and every page that is newly in use shifts those behind it. A place is one number: pack << 32 |
    item.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

from torpor.snapshots.pack import FRAME_BYTES, PAGE_BYTES, PAGE_DIGEST_BYTES, PackIndex, PackRef

PAGES_PER_FRAME = FRAME_BYTES // PAGE_BYTES
PAGES_PER_PACK = 8192
# A restore decompresses whole frames, and survivors of old images lie in ever sparser ones: after 100 steps
# of a 78 MB agent it would read six times the frames it needs. Above twice the least number of frames the
# sparsest are emptied by storing their pages again, some at each save, which adds about a fifth to what long
# sessions store.
FRAMES_OVER_IDEAL_MAX = 2.0
PAGES_MOVED_PER_SAVE_MAX = 512


@dataclass(frozen=True, slots=True)
class Extent:
    """`count` consecutive pages of the file are `count` consecutive items of one pack."""

    count: int
    pack: int
    first: int

    @property
    def place(self) -> int:
        return self.pack << 32 | self.first


@dataclass(frozen=True, slots=True)
class PageIndex:
    """Every page of one stored image: `digests` is 16 bytes a page, `places` refer to `packs`."""

    packs: tuple[PackRef, ...]
    digests: bytes
    places: "array[int]"

    @property
    def pages(self) -> int:
        return len(self.places)

    def by_digest(self, is_present: Sequence[bool]) -> dict[bytes, int]:
        """Place of each digest, without the packs that are no longer there."""
        step = PAGE_DIGEST_BYTES
        digests = [self.digests[at : at + step] for at in range(0, len(self.digests), step)]
        if all(is_present):
            return dict(zip(digests, self.places, strict=True))
        pairs = zip(digests, self.places, strict=True)
        return {digest: place for digest, place in pairs if is_present[place >> 32]}


EMPTY_INDEX = PageIndex((), b"", array("Q"))


@dataclass(frozen=True, slots=True)
class PagePlan:
    """What to store: `new` are page numbers in the file; the k-th goes to item k % PAGES_PER_PACK of new pack
    k // PAGES_PER_PACK, whose number is `first_pack` higher."""

    digests: list[bytes]
    places: "array[int]"
    new: list[int]
    first_pack: int


def hash_pages(image: memoryview) -> list[bytes]:
    """The first 16 bytes of each page's SHA-256; the last page is padded with zeros."""
    whole = len(image) - len(image) % PAGE_BYTES
    digests = [sha256(image[at : at + PAGE_BYTES]).digest()[:PAGE_DIGEST_BYTES] for at in range(0, whole, PAGE_BYTES)]
    if whole < len(image):
        last = bytes(image[whole:]).ljust(PAGE_BYTES, b"\0")
        digests.append(sha256(last).digest()[:PAGE_DIGEST_BYTES])
    return digests


def pages_digests(pages: memoryview) -> bytes:
    """The digests of whole pages, one after another."""
    return b"".join(hash_pages(pages))


def plan_pages(digests: list[bytes], known: dict[bytes, int], first_pack: int) -> PagePlan:
    """Find each page's place; `known` is used up."""
    for digest in _pages_to_move(digests, known):
        del known[digest]
    places, new = array("Q"), list[int]()
    for page, digest in enumerate(digests):
        place = known.get(digest)
        if place is None:
            pack, item = divmod(len(new), PAGES_PER_PACK)
            place = known[digest] = first_pack + pack << 32 | item
            new.append(page)
        places.append(place)
    return PagePlan(digests, places, new, first_pack)


def _pages_to_move(digests: Iterable[bytes], known: dict[bytes, int]) -> list[bytes]:
    """Known pages in the sparsest frames, once the image is spread over too many frames."""
    kept = [(digest, known[digest]) for digest in set(digests) if digest in known]
    use = Counter(_frame_of(place) for _, place in kept)
    frames_max = FRAMES_OVER_IDEAL_MAX * (len(kept) / PAGES_PER_FRAME + 1)
    excess = len(use) - int(frames_max)
    budget, emptied = PAGES_MOVED_PER_SAVE_MAX, set[int]()
    for pages, frame in sorted((pages, frame) for frame, pages in use.items())[: max(0, excess)]:
        budget -= pages
        if budget < 0:
            break
        emptied.add(frame)
    return [digest for digest, place in kept if _frame_of(place) in emptied] if emptied else []


def _frame_of(place: int) -> int:
    """A number for the frame that holds the item: its place without the item's low bits."""
    return place // PAGES_PER_FRAME


def extents_of(places: Iterable[int]) -> Iterator[Extent]:
    """Run-length code places in file order."""
    start, count = 0, 0
    for place in places:
        if place == start + count and count:
            count += 1
            continue
        if count:
            yield Extent(count, start >> 32, start & 0xFFFFFFFF)
        start, count = place, 1
    if count:
        yield Extent(count, start >> 32, start & 0xFFFFFFFF)


def index_of_extents(extents: Iterable[Extent], packs: Sequence[PackIndex]) -> PageIndex:
    """Rebuild the index of a stored image from its extents and its packs' indexes."""
    digests, places = bytearray(), array("Q")
    for extent in extents:
        digests += packs[extent.pack].digests_of(extent.first, extent.count)
        places.extend(range(extent.place, extent.place + extent.count))
    return PageIndex(tuple(pack.ref for pack in packs), bytes(digests), places)
