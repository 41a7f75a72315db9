"""Lays the pages of one image side by side again, in new packs: its restore then reads what a first snapshot's does.

A long session's image is partly deltas, and lies in more frames than it fills (scatter.py): less would store far more
at each step. Of an image that lies idle it is worth it, once.
"""

from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torpor.snapshots.backend import Backend
from torpor.snapshots.content_ids import PAGE_BYTES, PAGE_ID_BYTES, ContentIds
from torpor.snapshots.image import restore_paged
from torpor.snapshots.manifest import Manifest, PagedFile, WholeFile, decode_extents, encode_extents
from torpor.snapshots.pack import PackRef, read_pack_index
from torpor.snapshots.page_packs import PagePacks
from torpor.snapshots.pages import PAGES_PER_FRAME, Extent, count_pages, extents_of, page_list_of

FRAMES_OVER_IDEAL = 1.1
"""Above this an image is scattered."""
_FRAMES_FREE = 2

Room = Callable[[int], AbstractContextManager[Path]]
"""An empty memory-backed directory for so many bytes. Raises MachineUnfit: `no_staging_space`."""


def is_scattered(manifest: Manifest) -> bool:
    """Whether a restore decompresses more frames than the image's pages fill; of packs that deltas need, all count."""
    frames: set[tuple[int, int]] = set()
    for pack in {number for needs in manifest.needs for number in needs}:
        frames.update((pack, frame) for frame in range(-(-count_pages(manifest.page_packs[pack]) // PAGES_PER_FRAME)))
    pages = 0
    for file in manifest.files:
        for extent in decode_extents(file.extents) if isinstance(file, PagedFile) else ():
            pages += extent.count
            frames.update((extent.pack, frame) for frame in _frames_of(extent))
    return len(frames) > FRAMES_OVER_IDEAL * pages / PAGES_PER_FRAME + _FRAMES_FREE


class Layout:
    """The new packs of one snapshot; `place` its files, then `finish`."""

    def __init__(self, backend: Backend, ids: ContentIds, room: Room) -> None:
        self._backend = backend
        self._ids = ids
        self._room = room
        self._packs = PagePacks(backend, ids)
        self._known: dict[bytes, int] = {}

    @property
    def stored_bytes(self) -> int:
        return self._packs.stored_bytes

    def place(self, manifest: Manifest) -> tuple[PagedFile | WholeFile, ...]:
        """The image's files, of which the paged ones lie in the new packs once `finish` returns.

        Raises:
            Damaged: a page is not what was saved.
            MachineUnfit: `no_staging_space`, `no_space`, `storage_failed`.
        """
        packs = [read_pack_index(self._backend, ref) for ref in manifest.page_packs]
        files: list[PagedFile | WholeFile] = []
        for file in manifest.files:
            if isinstance(file, PagedFile):
                with self._room(file.size) as directory:
                    restore_paged(file, packs, self._backend, directory)
                    ids = page_list_of(decode_extents(file.extents), packs)
                    places = self._store(directory / file.name, ids)
                extents = encode_extents(extents_of(places))
                files.append(PagedFile(file.name, file.size, file.page_list, extents))
            else:
                files.append(file)
        return tuple(files)

    def finish(self) -> Sequence[PackRef]:
        """Durable on return."""
        self._packs.finish()
        return self._packs.packs

    def _store(self, image: Path, ids: bytes) -> "array[int]":
        """Each page's place; equal ones are stored once."""
        places = array("Q")
        with image.open("rb") as source:
            for at in range(0, len(ids), PAGE_ID_BYTES):
                page_id, page = ids[at : at + PAGE_ID_BYTES], source.read(PAGE_BYTES)
                if page_id not in self._known:
                    pack, item = self._packs.add(page.ljust(PAGE_BYTES, b"\0"), page_id)
                    self._known[page_id] = pack << 32 | item
                places.append(self._known[page_id])
        self._packs.end_frame()
        return places


def _frames_of(extent: Extent) -> range:
    return range(extent.first // PAGES_PER_FRAME, (extent.first + extent.count - 1) // PAGES_PER_FRAME + 1)
