"""The pages that deltas are compressed against: read from their packs, a frame at a time, the last ones kept in memory.

Thread-safe. Frames of pages are asked for again and again by the saves of one session, so a few sessions' are kept.
"""

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torpor.snapshots.backend import Backend
from torpor.snapshots.content_ids import PAGE_BYTES
from torpor.snapshots.pack import Frame, PackIndex, PackRef, damaged, read_object, read_pack_index

_FRAMES_KEPT = 64
_INDEXES_KEPT = 64
_THREADS = 8

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Bases:
    """Reads pages of packs, by pack and item."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._frames: OrderedDict[tuple[bytes, int], bytes] = OrderedDict()
        self._indexes: OrderedDict[bytes, PackIndex] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, places: Sequence[tuple[PackRef, int]]) -> dict[tuple[bytes, int], bytes]:
        """The bytes of each page, by its pack's name and its item.

        Raises:
            Damaged: snapshot_object_missing, snapshot_damaged.
        """
        wanted: defaultdict[PackRef, list[int]] = defaultdict(list)
        for ref, item in dict.fromkeys(places):
            wanted[ref].append(item)
        pages: dict[tuple[bytes, int], bytes] = {}
        with ThreadPoolExecutor(_THREADS) as threads:
            indexes = dict(zip(wanted, threads.map(self._index, wanted), strict=True))
            by_frame: defaultdict[tuple[PackRef, int], list[int]] = defaultdict(list)
            for ref, items in wanted.items():
                for item in items:
                    by_frame[ref, indexes[ref].frame_of(item)].append(item)
            reads = [(indexes[ref], indexes[ref].frames[number], items) for (ref, number), items in by_frame.items()]
            for found in threads.map(self._pages, reads):
                pages.update(found)
        return pages

    def of_frame(self, pack: PackIndex, frame: Frame, needed: Sequence[PackRef]) -> bytes:
        """What a delta frame is compressed against; `needed` are the packs that its pack names.

        Raises:
            Damaged: as `read`.
        """
        places = [(needed[base], item) for base, item in pack.bases_of(frame)]
        pages = self.read(places)
        return b"".join([pages[ref.name, item] for ref, item in places])

    def holds(self, ref: PackRef, item: int) -> bool:
        """Whether the frame of this item is in memory."""
        with self._lock:
            index = self._indexes.get(ref.name)
            return index is not None and item < index.items and (ref.name, index.frame_of(item)) in self._frames

    def _pages(self, read: tuple[PackIndex, Frame, list[int]]) -> list[tuple[tuple[bytes, int], bytes]]:
        pack, frame, items = read
        raw, name, first = self._frame(pack, frame), pack.ref.name, frame.first_item
        return [((name, item), raw[(item - first) * PAGE_BYTES : (item - first + 1) * PAGE_BYTES]) for item in items]

    def _index(self, ref: PackRef) -> PackIndex:
        with self._lock:
            found = self._indexes.get(ref.name)
        if found is None:
            found = read_pack_index(self._backend, ref)
            self._keep(self._indexes, ref.name, found, _INDEXES_KEPT)
        return found

    def _frame(self, pack: PackIndex, frame: Frame) -> bytes:
        key = pack.ref.name, frame.number
        with self._lock:
            found = self._frames.get(key)
        if found is None:
            if frame.is_delta:
                raise damaged(pack.ref.key, f"frame {frame.number} is needed as a base, and is a delta itself")
            stored = read_object(self._backend, pack.ref.key, frame.offset, frame.stored_bytes)
            found = pack.open_frame(frame, stored)
        self._keep(self._frames, key, found, _FRAMES_KEPT)
        return found

    def _keep(self, kept: "OrderedDict[_Key, _Value]", key: _Key, value: _Value, count: int) -> None:
        with self._lock:
            kept[key] = value
            kept.move_to_end(key)
            while len(kept) > count:
                kept.popitem(last=False)
