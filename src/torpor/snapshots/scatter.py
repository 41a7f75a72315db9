"""Which frames of an image are emptied by storing their pages again, so that a restore reads about as many, of about
as many packs, whether it is the first or the thousandth. Pure.

Each save stores the pages that changed, so what is left of old saves lies in ever sparser frames of ever more packs.
A delta costs little to store again, so deltas are kept close together; frames that others need as bases are left.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torpor.snapshots.pages import BASES_PER_PACK_MIN, PAGES_PER_FRAME, PAGES_PER_PACK, PageIndex, frame_of

FRAMES_NEEDED_MAX = 2.25
"""All frames that a restore decompresses, over those that the image fills; above it the image is stored anew."""
PACKS_NEEDED_MAX = 12
"""Packs beyond those that the image would fill; above it the image is stored anew."""
PACKS_FREE_MAX = 6
"""Packs that hold no bases; above it the smallest become one, until half as many are left."""
PAGES_MOVED_PER_SAVE_MAX = 8192
_FRAMES_SLACK = 8
_SLICE = 4096


@dataclass(frozen=True, slots=True)
class Scatter:
    """What to do about an image's frames before its new pages are stored.

    Attributes:
        emptied: numbers of packs of which the pages are stored again.
        holders: numbers of packs whose pages may be the bases of new ones.
        anew: so much is needed that the whole image is stored as if it were the first.
    """

    emptied: frozenset[int] = frozenset()
    holders: frozenset[int] = frozenset()
    anew: bool = False


def look(places: Sequence[int | None], parent: PageIndex) -> Scatter:
    """Args:
    places: of the image's pages, as far as they are known, in the parent's packs.
    """
    kept = list({place for place in places if place is not None})
    use = _count(kept, frame_of)
    needed = _frames_of_bases(parent, use)
    fixed = {_pack_of(frame) for frame in needed}
    packs = {_pack_of(frame) for frame in use}
    ideal = len(places) / PAGES_PER_FRAME
    new = sum(place is None for place in places)
    frames = len(use.keys() | needed) + new / PAGES_PER_FRAME
    if kept and (
        frames > FRAMES_NEEDED_MAX * ideal + _FRAMES_SLACK
        or len(fixed | packs) > ideal * PAGES_PER_FRAME / PAGES_PER_PACK + PACKS_NEEDED_MAX
    ):
        return Scatter(anew=True)
    serving = _count(parent.bases, _pack_of_place)
    enough = min(BASES_PER_PACK_MIN, parent.pages // 4)
    may_hold = fixed | {pack for pack, pages in serving.items() if pages >= enough}
    holders = {pack for pack in may_hold if not parent.needs[pack]}
    return Scatter(frozenset(_small_packs(_count(kept, _pack_of_place), holders, new)), frozenset(holders))


def _small_packs(pages: "Counter[int]", holders: set[int], new: int) -> set[int]:
    """The smallest packs, as long as one holds no more than half of what is stored without it, or there are too many:
    so packs grow in size, and each page is stored again a few times until it is in one of an image's size.
    """
    free = sorted((count, pack) for pack, count in pages.items() if pack not in holders)
    emptied, moved = set[int](), 0
    for count, pack in free:
        are_many = len(free) > PACKS_FREE_MAX and len(free) - len(emptied) > PACKS_FREE_MAX // 2
        if moved + count > PAGES_MOVED_PER_SAVE_MAX or (count > (new + moved) // 2 and not are_many):
            break
        emptied.add(pack)
        moved += count
    return emptied


def _count(places: Sequence[int], key: Callable[[int], int]) -> "Counter[int]":
    use: Counter[int] = Counter()
    for at in range(0, len(places), _SLICE):
        use.update([key(place) for place in places[at : at + _SLICE]])
    return use


def _frames_of_bases(parent: PageIndex, use: "Counter[int]") -> set[int]:
    """Frames that are bases of what is in use."""
    needed: set[int] = set()
    for at in range(0, parent.pages, _SLICE):
        pairs = zip(parent.places[at : at + _SLICE], parent.bases[at : at + _SLICE], strict=True)
        needed.update([frame_of(base) for place, base in pairs if base != place and frame_of(place) in use])
    return needed


def _pack_of(frame: int) -> int:
    return frame * PAGES_PER_FRAME >> 32


def _pack_of_place(place: int) -> int:
    return place >> 32
