"""An image's files on their way into the store and back: memory by pages, small files as contents.

Owns reading and writing the files; what is new is decided in pages.py. A restore verifies and decompresses
every frame that it needs once, and writes its pages where they belong, on several threads: fetching, hashing,
decompressing and writing all leave the interpreter to the others.
"""

import contextlib
import mmap
from array import array
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from torpor.core.crash import crash_point
from torpor.snapshots.backend import Backend, storage_errors
from torpor.snapshots.beneath import write_at
from torpor.snapshots.chunks import write_content
from torpor.snapshots.content_ids import PAGE_BYTES, ContentIds
from torpor.snapshots.manifest import PagedFile, WholeFile, decode_extents, encode_extents
from torpor.snapshots.objects import Objects
from torpor.snapshots.pack import Frame, PackBuilder, PackIndex, PackRef, damaged, read_object, read_pack_index
from torpor.snapshots.pages import (
    PAGES_PER_FRAME,
    PAGES_PER_PACK,
    Extent,
    PageIndex,
    extents_of,
    index_of_extents,
    page_list_of,
    plan_pages,
)

_READ_BYTES_MAX = 4 * 1024 * 1024
# More than processors: a store on another machine is waited for. Each holds one read and one raw frame.
_THREADS = 8
# A step's few megabytes can afford level 3, which stores a tenth less; a first image would take three times as long.
_BULK_LEVEL, _STEP_LEVEL = 1, 3


class PageWriter:
    """Stores memory images against the pages of a parent; every pack is durable when `store` returns."""

    def __init__(self, backend: Backend, ids: ContentIds, parent: PageIndex, present: Sequence[bool]) -> None:
        self._backend = backend
        self._ids = ids
        self._packs = list(parent.packs)
        self._known = parent.by_id(present)
        self._files: list[tuple[str, int, list[bytes], list[Extent]]] = []
        self.stored_bytes = 0
        self.new_pages = 0
        self.total_pages = 0

    def store(self, path: Path) -> None:
        with _mapped(path) as image:
            plan = plan_pages(self._ids.of_pages(image), self._known, len(self._packs))
            for start in range(0, len(plan.new), PAGES_PER_PACK):
                self._store_pack(image, plan.new[start : start + PAGES_PER_PACK], plan.ids)
            self._files.append((path.name, len(image), plan.ids, list(extents_of(plan.places))))
        self.new_pages += len(plan.new)
        self.total_pages += len(plan.places)

    def _store_pack(self, image: memoryview, pages: list[int], ids: list[bytes]) -> None:
        level = _BULK_LEVEL if len(pages) == PAGES_PER_PACK else _STEP_LEVEL
        builder = PackBuilder(self._ids, holds_pages=True, level=level)
        for start in range(0, len(pages), PAGES_PER_FRAME):
            frame = pages[start : start + PAGES_PER_FRAME]
            raw = b"".join([image[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] for page in frame])
            # Only the file's last page can be short, and it can only be the last one here.
            builder.add_frame(raw.ljust(len(frame) * PAGE_BYTES, b"\0"), [ids[page] for page in frame])
        index, data = builder.finish()
        if self._backend.put(index.ref.key, data):
            self.stored_bytes += len(data)
        self._packs.append(index.ref)
        crash_point("snapshot.pack_written")

    def finish(self) -> tuple[list[PagedFile], PageIndex]:
        """The files as a manifest holds them, and the index for the next save; packs without a page in use
        are left out.
        """
        used = sorted({extent.pack for *_, extents in self._files for extent in extents})
        number = {pack: at for at, pack in enumerate(used)}
        files: list[PagedFile] = []
        all_ids, places = list[bytes](), array("Q")
        for name, size, ids, extents in self._files:
            moved = [Extent(extent.count, number[extent.pack], extent.first) for extent in extents]
            page_list = sha256(b"".join(ids)).digest()
            files.append(PagedFile(name, size, page_list, encode_extents(moved)))
            all_ids += ids
            for extent in moved:
                places.extend(range(extent.place, extent.place + extent.count))
        return files, PageIndex(tuple(self._packs[pack] for pack in used), b"".join(all_ids), places)


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


@dataclass(frozen=True, slots=True)
class _Run:
    """`count` pages of a frame, from its page `first`, go to the file's page `target`."""

    target: int
    first: int
    count: int


def read_pack_indexes(refs: Sequence[PackRef], backend: Backend) -> list[PackIndex]:
    """Raises Damaged: snapshot_object_missing or snapshot_damaged."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(partial(read_pack_index, backend), refs))


def restore_paged(file: PagedFile, packs: Sequence[PackIndex], backend: Backend, directory: Path) -> None:
    """Write a memory image that must not exist yet.

    Raises:
        Damaged: snapshot_damaged, snapshot_object_missing.
    """
    extents = decode_extents(file.extents)
    if sha256(page_list_of(extents, packs)).digest() != file.page_list:
        raise damaged(f"image file {file.name}", "its extents do not give the pages that were saved")
    path = directory / file.name
    with storage_errors(f"write image file {path}"), path.open("xb", buffering=0) as target:
        path.chmod(0o600)
        with ThreadPoolExecutor(_THREADS) as threads:
            jobs = [
                threads.submit(_restore_frames, backend, pack, frames, target.fileno())
                for pack, frames in _reads(extents, packs)
            ]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
        target.truncate(file.size)


_FrameRuns = list[tuple[Frame, list[_Run]]]


def _reads(extents: list[Extent], packs: Sequence[PackIndex]) -> Iterator[tuple[PackIndex, _FrameRuns]]:
    """One read each: neighbouring frames of a pack and what they are wanted for."""
    runs: dict[tuple[int, int], list[_Run]] = defaultdict(list)
    target = 0
    for extent in extents:
        first, end = extent.first, extent.first + extent.count
        while first < end:
            frame, skipped = divmod(first, PAGES_PER_FRAME)
            count = min(end - first, PAGES_PER_FRAME - skipped)
            runs[extent.pack, frame].append(_Run(target, skipped, count))
            first += count
            target += count
    read: _FrameRuns = []
    read_pack = -1
    for pack, number in sorted(runs):
        frame = packs[pack].frames[number]
        if read and not (pack == read_pack and _is_next(read, frame)):
            yield packs[read_pack], read
            read = []
        read_pack = pack
        read.append((frame, runs[pack, number]))
    if read:
        yield packs[read_pack], read


def _is_next(read: _FrameRuns, frame: Frame) -> bool:
    start, last = read[0][0].offset, read[-1][0]
    return last.offset + last.stored_bytes == frame.offset and frame.offset - start < _READ_BYTES_MAX


def _restore_frames(backend: Backend, pack: PackIndex, frames: _FrameRuns, descriptor: int) -> None:
    start = frames[0][0].offset
    length = frames[-1][0].offset + frames[-1][0].stored_bytes - start
    stored = memoryview(read_object(backend, pack.ref.key, start, length))
    for frame, runs in frames:
        at = frame.offset - start
        raw = memoryview(pack.open_frame(frame, stored[at : at + frame.stored_bytes]))
        for run in runs:
            piece = raw[run.first * PAGE_BYTES : (run.first + run.count) * PAGE_BYTES]
            write_at(descriptor, piece, run.target * PAGE_BYTES)


def restore_whole(file: WholeFile, objects: Objects, directory: Path) -> None:
    """Write a small file that must not exist yet."""
    path = directory / file.name
    with storage_errors(f"write image file {path}"), path.open("xb", buffering=0) as target:
        path.chmod(0o600)
        write_content(target.fileno(), file.content, file.size, objects)


def page_index(files: Sequence[PagedFile], packs: Sequence[PackIndex]) -> PageIndex:
    """Rebuild the index of a stored image."""
    return index_of_extents([extent for file in files for extent in decode_extents(file.extents)], packs)
