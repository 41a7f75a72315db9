"""An image's files on their way into the store and back: memory by pages, small files as contents.

Owns reading and writing the files; what is new is decided in pages.py. A restore verifies and decompresses
every frame that it needs once, and writes its pages where they belong, on several threads: fetching, hashing,
decompressing and writing all leave the interpreter to the others.
"""

import contextlib
import mmap
from array import array
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from torpor.core.crash import crash_point
from torpor.core.errors import Damaged
from torpor.snapshots.backend import Backend, storage_errors
from torpor.snapshots.bases import Bases
from torpor.snapshots.beneath import write_at
from torpor.snapshots.chunks import write_content
from torpor.snapshots.content_ids import PAGE_BYTES, ContentIds
from torpor.snapshots.frames import Delta, FrameUse, Run, plan_frames
from torpor.snapshots.manifest import PagedFile, WholeFile, decode_extents, encode_extents
from torpor.snapshots.objects import Objects
from torpor.snapshots.pack import Base, Frame, PackBuilder, PackIndex, damaged, read_object
from torpor.snapshots.pages import (
    PAGES_PER_FRAME,
    PAGES_PER_PACK,
    Extent,
    PageIndex,
    PagePlan,
    Versions,
    base_numbers,
    extents_of,
    index_of_extents,
    page_list_of,
    places_of,
    plan_pages,
)
from torpor.snapshots.scatter import look

_READ_BYTES_MAX = 4 * 1024 * 1024
# More than processors: a store on another machine is waited for. Each holds one read and one raw frame.
_THREADS = 8
# A step's few megabytes can afford level 3, which stores a tenth less; a first image would take three times as long.
_BULK_LEVEL, _STEP_LEVEL = 1, 3
# A save reads so many frames of bases that are not in memory; one that stores much, one for so many pages.
_BASE_READS_MIN, _PAGES_PER_BASE_READ = 64, 64
# What a delta of a base that was just stored stores, over what its page would by itself.
_FRESH_DELTA_SHARE = 0.12
# A first image that would store more than this, over what it would by itself, has bases of its own: with another
# session's that are so unlike it would save some megabytes once, and store more at each of its turns.
_FIRST_DELTA_SHARE_MAX = 0.5
_ITEM = 0xFFFFFFFF
_SLICE = 4096


@dataclass(frozen=True, slots=True)
class _Building:
    """A pack, and the places of the bases of its deltas, by their items."""

    builder: PackBuilder
    bases: dict[int, int]


class PageWriter:
    """Stores memory images against the pages of a parent; every pack is durable when `store` returns.

    An image moves away from its bases, and its deltas grow. What they store more than they would have right after the
    image was stored whole is added up: the debt. Once that would have paid for another whole image, one is stored.
    Whenever the session ends, it has not stored more than twice of what it would have with the best foresight.

    Attributes:
        problem: why the parent's pages were not used; empty when all is well.
    """

    def __init__(
        self,
        backend: Backend,
        ids: ContentIds,
        parent: PageIndex,
        present: Sequence[bool],
        bases: Bases,
        *,
        is_first: bool,
    ) -> None:
        """Args:
        is_first: the parent is another session's.
        """
        self._backend = backend
        self._ids = ids
        self._parent = parent
        self._present = present
        self._bases = bases
        self._packs = list(parent.packs)
        self._needs = list(parent.needs)
        self._known = parent.by_id(parent.readable(present))
        self._base_of = parent.bases_of_deltas()
        self._files: list[tuple[str, int, list[bytes], array[int]]] = []
        self._is_first = is_first
        self._debt = parent.debt
        self.problem = ""
        self.stored_bytes = 0
        self.new_pages = 0
        self.total_pages = 0

    def store(self, path: Path) -> None:
        with _mapped(path) as image:
            ids = self._ids.of_pages(image)
            plan = self._plan(ids)
            first = self._build_pack(image, plan, *plan.packs[0]) if plan.packs else None
            if first is not None and self._is_to_be_anew(first, len(ids)):
                plan, first, self._debt = self._plan_anew(ids), None, 0
            if first is not None:
                self._store_pack(first)
            for bounds in plan.packs[int(first is not None) :]:
                self._store_pack(self._build_pack(image, plan, *bounds))
            self._files.append((path.name, len(image), plan.ids, plan.places))
        self.new_pages += len(plan.new)
        self.total_pages += len(plan.places)

    def _plan(self, ids: list[bytes]) -> PagePlan:
        scatter = look(places_of(ids, self._known), self._parent)
        if scatter.anew:
            self._debt = 0
            return self._plan_anew(ids)
        holders = {pack for pack in scatter.holders if self._present[pack]}
        versions = Versions(self._parent, holders, self._afford)
        return plan_pages(ids, self._known, len(self._packs), scatter.emptied, versions)

    def _afford(self, wanted: "Counter[int]") -> set[int]:
        """Of which frames bases are read: those in memory, and of the others those that serve most pages."""
        reads_max = max(_BASE_READS_MIN, wanted.total() // _PAGES_PER_BASE_READ)
        afforded: set[int] = set()
        for frame, _ in wanted.most_common():
            pack, first = divmod(frame * PAGES_PER_FRAME, _ITEM + 1)
            if not self._bases.holds(self._packs[pack], first):
                reads_max -= 1
                if reads_max < 0:
                    continue
            afforded.add(frame)
        return afforded

    def _plan_anew(self, ids: list[bytes]) -> PagePlan:
        """The whole image as if it were the first: from now on its pages are the bases."""
        self._known.clear()
        return plan_pages(ids, self._known, len(self._packs))

    def _is_to_be_anew(self, building: "_Building", pages: int) -> bool:
        """Whether bases can't be read, or have cost as much as new ones would."""
        builder = building.builder
        if self.problem or not builder.delta_items:
            return bool(self.problem)
        if self._is_first:
            stored, alone = (of + builder.in_vain_bytes for of in (builder.delta_bytes, builder.plain_bytes))
            return stored > _FIRST_DELTA_SHARE_MAX * alone
        self._debt += max(0, round(builder.delta_bytes - _FRESH_DELTA_SHARE * builder.plain_bytes))
        return self._debt > pages * builder.plain_bytes / builder.delta_items

    def _build_pack(self, image: memoryview, plan: PagePlan, start: int, end: int) -> "_Building":
        """The pack of a part of the plan's new pages."""
        pages, bases = plan.new[start:end], plan.bases[start:end]
        level = _BULK_LEVEL if len(pages) == PAGES_PER_PACK else _STEP_LEVEL
        building = _Building(PackBuilder(self._ids, holds_pages=True, level=level), {})
        raw_bases = self._bytes_of(bases)
        for first, end in _frame_bounds(len(bases), len(pages)):
            frame, based_on = pages[first:end], bases[first:end]
            raw = _pages_of(image, frame)
            base = None
            if based_on and raw_bases:
                named = [(self._packs[place >> 32].name, place & _ITEM) for place in based_on]
                base = Base(named, b"".join([raw_bases[place] for place in named]))
            if building.builder.add_frame(raw, [plan.ids[page] for page in frame], base=base):
                building.bases.update(zip(range(first, end), based_on, strict=True))
        return building

    def _bytes_of(self, bases: Sequence[int]) -> dict[tuple[bytes, int], bytes]:
        """Nothing when they can't be read: what is to be saved has not to suffer for it."""
        try:
            return self._bases.read([(self._packs[place >> 32], place & _ITEM) for place in bases])
        except Damaged as error:
            self.problem = str(error)
            return {}

    def _store_pack(self, building: "_Building") -> None:
        index, data = building.builder.finish()
        if self._backend.put(index.ref.key, data):
            self.stored_bytes += len(data)
        number = len(self._packs)
        self._base_of.update({number << 32 | item: base for item, base in building.bases.items()})
        numbers = {ref.name: at for at, ref in enumerate(self._packs)}
        self._packs.append(index.ref)
        self._needs.append(tuple(base_numbers(index, numbers)))
        crash_point("snapshot.pack_written")

    def finish(self) -> tuple[list[PagedFile], PageIndex]:
        """The files as a manifest holds them, and the index for the next save; packs that are not needed are left
        out.
        """
        used = {extent.pack for *_, places in self._files for extent in extents_of(places)}
        packs = sorted(used.union(*(self._needs[pack] for pack in used)))
        number = {pack: at for at, pack in enumerate(packs)}
        files: list[PagedFile] = []
        all_ids, all_places, bases = list[bytes](), array("Q"), array("Q")
        for name, size, ids, places in self._files:
            extents = [Extent(count, number[pack], first) for count, pack, first in extents_of(places)]
            files.append(PagedFile(name, size, sha256(b"".join(ids)).digest(), encode_extents(extents)))
            all_ids += ids
            for extent in extents:
                all_places.extend(range(extent.place, extent.place + extent.count))
            for at in range(0, len(places), _SLICE):
                found = [self._base_of.get(place, place) for place in places[at : at + _SLICE]]
                bases.extend([number[place >> 32] << 32 | place & _ITEM for place in found])
        # Of a pack that is needed for bases alone no delta is opened.
        needs = tuple(tuple(number[at] for at in self._needs[pack]) if pack in used else () for pack in packs)
        refs = tuple(self._packs[pack] for pack in packs)
        return files, PageIndex(refs, b"".join(all_ids), all_places, bases, needs, self._debt)


def _frame_bounds(based: int, pages: int) -> Iterator[tuple[int, int]]:
    """The first and the end of each frame of a pack: a frame holds deltas alone, or none."""
    for first, end in ((0, based), (based, pages)):
        for at in range(first, end, PAGES_PER_FRAME):
            yield at, min(at + PAGES_PER_FRAME, end)


def _pages_of(image: memoryview, frame: Sequence[int]) -> bytes:
    """Pages by their numbers, whole: only the file's last one can be short."""
    raw = [image[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] for page in frame]
    return b"".join([bytes(piece).ljust(PAGE_BYTES, b"\0") if len(piece) < PAGE_BYTES else piece for piece in raw])


@contextlib.contextmanager
def _mapped(path: Path) -> Generator[memoryview]:
    """A file's bytes without reading them into memory of our own."""
    with storage_errors(f"read image file {path}"), path.open("rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            yield memoryview(b"")
            return
        with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapping, memoryview(mapping) as view:
            yield view


def restore_paged(file: PagedFile, packs: Sequence[PackIndex], backend: Backend, directory: Path) -> None:
    """Write a memory image that must not exist yet.

    Raises:
        Damaged: snapshot_damaged, snapshot_object_missing.
    """
    extents = decode_extents(file.extents)
    if sha256(page_list_of(extents, packs)).digest() != file.page_list:
        raise damaged(f"image file {file.name}", "its extents do not give the pages that were saved")
    path = directory / file.name
    uses, deltas = plan_frames(extents, packs)
    with storage_errors(f"write image file {path}"), path.open("xb", buffering=0) as target:
        path.chmod(0o600)
        restoring = _Restoring(backend, target.fileno())
        with ThreadPoolExecutor(_THREADS) as threads:
            jobs = [threads.submit(restoring.fetch, packs[pack], read) for pack, read in _reads(deltas)]
            jobs += [threads.submit(restoring.open, packs[pack], read) for pack, read in _reads(uses)]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
        target.truncate(file.size)


_Wanted = TypeVar("_Wanted", FrameUse, Delta)


def _reads(wanted: dict[tuple[int, int], _Wanted]) -> Iterator[tuple[int, list[_Wanted]]]:
    """One read each: neighbouring frames of a pack."""
    read: list[_Wanted] = []
    read_pack = -1
    for pack, number in sorted(wanted):
        use = wanted[pack, number]
        if read and not (pack == read_pack and _is_next(read[0].frame, read[-1].frame, use.frame)):
            yield read_pack, read
            read = []
        read_pack = pack
        read.append(use)
    if read:
        yield read_pack, read


def _is_next(first: Frame, last: Frame, frame: Frame) -> bool:
    return last.offset + last.stored_bytes == frame.offset and frame.offset - first.offset < _READ_BYTES_MAX


class _Restoring:
    """Fills one image file, on several threads."""

    def __init__(self, backend: Backend, descriptor: int) -> None:
        self._backend = backend
        self._descriptor = descriptor

    def open(self, pack: PackIndex, uses: Sequence[FrameUse]) -> None:
        """Write the pages of frames that are no deltas, and open the deltas that waited for nothing else."""
        for use, stored in self._read(pack, uses):
            raw = memoryview(pack.open_frame(use.frame, stored))
            self._write(raw, use.runs)
            for feed in use.feeds:
                if feed.delta.feed(feed, raw):
                    self._write(feed.delta.open(), feed.delta.runs)

    def fetch(self, pack: PackIndex, deltas: Sequence[Delta]) -> None:
        for delta, stored in self._read(pack, deltas):
            if delta.fetched(stored):
                self._write(delta.open(), delta.runs)

    def _read(self, pack: PackIndex, wanted: Sequence[_Wanted]) -> Iterator[tuple[_Wanted, memoryview]]:
        start, last = wanted[0].frame.offset, wanted[-1].frame
        length = last.offset + last.stored_bytes - start
        stored = memoryview(read_object(self._backend, pack.ref.key, start, length))
        for one in wanted:
            at = one.frame.offset - start
            yield one, stored[at : at + one.frame.stored_bytes]

    def _write(self, raw: memoryview, runs: Sequence[Run]) -> None:
        for target, first, count in runs:
            write_at(self._descriptor, raw[first * PAGE_BYTES : (first + count) * PAGE_BYTES], target * PAGE_BYTES)


def restore_whole(file: WholeFile, objects: Objects, directory: Path) -> None:
    """Write a small file that must not exist yet."""
    path = directory / file.name
    with storage_errors(f"write image file {path}"), path.open("xb", buffering=0) as target:
        path.chmod(0o600)
        write_content(target.fileno(), file.content, file.size, objects)


def page_index(files: Sequence[PagedFile], packs: Sequence[PackIndex], debt: int) -> PageIndex:
    """Rebuild the index of a stored image."""
    return index_of_extents([extent for file in files for extent in decode_extents(file.extents)], packs, debt)
