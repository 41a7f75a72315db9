"""Content-addressed objects (chunks of files, lists of chunks, directories) in object packs, and file
contents over them.

Owns what stands for a file's bytes in a directory or manifest. An object is stored once. What is called a digest here
is an object's id, which is a digest under the tenant's key (content_ids.py).
"""

import contextlib
import struct
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from torpor.core.crash import crash_point
from torpor.core.errors import Damaged
from torpor.snapshots.backend import Backend
from torpor.snapshots.content_ids import OBJECT_ID_BYTES, ContentIds
from torpor.snapshots.pack import (
    FRAME_BYTES,
    PACK_BYTES_MAX,
    PackBuilder,
    PackIndex,
    PackRef,
    damaged,
    read_object,
    read_pack_indexes,
)

CHUNK_BYTES_MAX = FRAME_BYTES
_LISTED_CHUNK = struct.Struct(f"<QI{OBJECT_ID_BYTES}s")
_FRAMES_CACHED = 64
# More than processors: a store on another machine is waited for.
_THREADS, _FRAMES_AHEAD, _INDEXES_AT_ONCE = 8, 16, 16
_FrameKey: TypeAlias = tuple[int, int]
"""By the number of the pack and that of the frame in it."""

_ALL_ZEROS, _ONE_OBJECT, _CHUNKS = range(3)


class Objects(Protocol):
    """Reads objects by digest."""

    def get(self, digest: bytes) -> bytes:
        """Raises Damaged."""
        ...

    def ahead(self, digests: Iterable[bytes]) -> None:
        """These will be asked for soon, in this order, before what was announced earlier."""
        ...

    def digest_of(self, data: bytes) -> bytes:
        """What an object of these bytes is called."""
        ...


class ObjectWriter:
    """Stores objects that are not in `known`, in packs that are durable once `finish` returns."""

    def __init__(self, backend: Backend, ids: ContentIds, known: Mapping[bytes, int]) -> None:
        self._backend = backend
        self._ids = ids
        self._known = known
        self._new: set[bytes] = set()
        self._builder = PackBuilder(ids, holds_pages=False)
        self._pieces: list[bytes] = []
        self._digests: list[bytes] = []
        self._raw_bytes = 0
        self.packs: list[PackIndex] = []
        self.stored_bytes = 0

    def put(self, data: bytes) -> bytes:
        """Give the digest of `data`, and see to it that it is stored."""
        digest = self._ids.of_object(data)
        if digest not in self._known and digest not in self._new:
            if self._raw_bytes + len(data) > FRAME_BYTES:
                self._close_frame()
            self._new.add(digest)
            self._pieces.append(data)
            self._digests.append(digest)
            self._raw_bytes += len(data)
        return digest

    def finish(self) -> None:
        """Write what is pending."""
        self._close_frame()
        self._close_pack()

    def _close_frame(self) -> None:
        if not self._digests:
            return
        self._builder.add_frame(b"".join(self._pieces), self._digests, [len(piece) for piece in self._pieces])
        self._pieces, self._digests, self._raw_bytes = [], [], 0
        if self._builder.stored_bytes >= PACK_BYTES_MAX:
            self._close_pack()

    def _close_pack(self) -> None:
        if self._builder.items == 0:
            return
        index, data = self._builder.finish()
        self._builder = PackBuilder(self._ids, holds_pages=False)
        if self._backend.put(index.ref.key, data):
            self.stored_bytes += len(data)
        self.packs.append(index)
        crash_point("snapshot.pack_written")


class ObjectReader:
    """Objects of some packs; the frames read last stay in memory, since neighbours are read together.

    Indexes are read from the last pack backwards until what is asked for is found: an image's few objects are mostly in
    the snapshot's own pack, which is the last, and each index of a store far away is a request.

    Used by one thread. Within `reading_ahead` frames that were announced are read by others meanwhile.
    """

    def __init__(self, backend: Backend, ids: ContentIds, packs: Sequence[PackIndex | PackRef]) -> None:
        self._backend = backend
        self._ids = ids
        self._unread = list(enumerate(packs))
        self._packs: dict[int, PackIndex] = {}
        self._places: dict[bytes, int] = {}
        self._frames: OrderedDict[_FrameKey, dict[bytes, bytes]] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None
        self._announced: deque[_FrameKey] = deque()
        self._reading: dict[_FrameKey, Future[dict[bytes, bytes]]] = {}

    @contextlib.contextmanager
    def reading_ahead(self) -> Generator[None]:
        """Read what is announced on several threads, a bounded number of frames before they are asked for."""
        self._threads = ThreadPoolExecutor(_THREADS)
        try:
            yield
        finally:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
            self._announced.clear()
            self._reading.clear()

    def get(self, digest: bytes) -> bytes:
        if not self._find(digest):
            raise damaged(f"object {digest.hex()}", "no pack of the snapshot holds it")
        key = self._frame_of(digest)
        frame = self._frames.get(key)
        if frame is None:
            reading = self._reading.pop(key, None)
            frame = self._read_frame(key) if reading is None else reading.result()
            self._keep(key, frame)
            self._read_on()
        else:
            self._frames.move_to_end(key)
        return frame[digest]

    def ahead(self, digests: Iterable[bytes]) -> None:
        if self._threads is not None:
            keys = dict.fromkeys(self._frame_of(digest) for digest in digests if self._find(digest))
            self._announced.extendleft(reversed(keys))
            self._read_on()

    def digest_of(self, data: bytes) -> bytes:
        return self._ids.of_object(data)

    def _keep(self, key: _FrameKey, frame: dict[bytes, bytes]) -> None:
        self._frames[key] = frame
        if len(self._frames) > _FRAMES_CACHED:
            self._frames.popitem(last=False)

    def _read_on(self) -> None:
        while len(self._reading) >= _FRAMES_AHEAD and (oldest := next(iter(self._reading.items())))[1].done():
            # Nobody asked for it yet, and perhaps nobody will: a file may be as it is to be already.
            del self._reading[oldest[0]]
            if oldest[1].exception() is None:
                self._keep(oldest[0], oldest[1].result())
        while self._threads is not None and self._announced and len(self._reading) < _FRAMES_AHEAD:
            key = self._announced.popleft()
            if key not in self._frames and key not in self._reading:
                self._reading[key] = self._threads.submit(self._read_frame, key)

    def _find(self, digest: bytes) -> bool:
        """Read indexes until it is known where this object is: first the last pack's, then several at a time."""
        while digest not in self._places and self._unread:
            count = _INDEXES_AT_ONCE if self._packs else 1
            some, self._unread = self._unread[-count:], self._unread[:-count]
            for (number, _), found in reversed(list(zip(some, self._read_indexes(some), strict=True))):
                self._packs[number] = found
                for item in range(found.items):
                    self._places.setdefault(found.ids_of(item, 1), number << 32 | item)
        return digest in self._places

    def _read_indexes(self, packs: Sequence[tuple[int, PackIndex | PackRef]]) -> list[PackIndex]:
        unread = [pack for _, pack in packs if isinstance(pack, PackRef)]
        read = iter(read_pack_indexes(unread, self._backend))
        return [next(read) if isinstance(pack, PackRef) else pack for _, pack in packs]

    def _frame_of(self, digest: bytes) -> _FrameKey:
        place = self._places[digest]
        pack = place >> 32
        return pack, self._packs[pack].frame_of(place & 0xFFFFFFFF)

    def _read_frame(self, key: _FrameKey) -> dict[bytes, bytes]:
        pack = self._packs[key[0]]
        frame = pack.frames[key[1]]
        raw = pack.open_frame(frame, read_object(self._backend, pack.ref.key, frame.offset, frame.stored_bytes))
        return dict(pack.split(frame, raw))


def places_of_objects(packs: Sequence[PackIndex]) -> dict[bytes, int]:
    """pack << 32 | item of every object."""
    places: dict[bytes, int] = {}
    for number, pack in enumerate(packs):
        for item in range(pack.items):
            places[pack.ids_of(item, 1)] = number << 32 | item
    return places


class Chunk(NamedTuple):
    """Where in a file the bytes of one object are."""

    offset: int
    length: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Content:
    """A file's bytes: `encoded` is what stands for them in a directory or manifest, `chunks` the digests
    behind it.
    """

    encoded: bytes
    chunks: tuple[bytes, ...]

    @property
    def objects(self) -> tuple[bytes, ...]:
        """Digests of all objects that a reader of this content needs."""
        return (*self.chunks, self.encoded[1:]) if self.encoded[0] == _CHUNKS else self.chunks


def content_bytes(layout: int) -> int:
    """Length of the encoding that starts with this layout byte."""
    if layout > _CHUNKS:
        raise Damaged("snapshot_damaged", f"cannot read content: layout {layout} is unknown")
    return 1 if layout == _ALL_ZEROS else 1 + OBJECT_ID_BYTES


def store_content(pieces: Iterable[tuple[int, bytes]], size: int, put: Callable[[bytes], bytes]) -> Content:
    """Store the pieces (offset, bytes) of a file of `size` bytes; the rest of it is zeros."""
    chunks = [Chunk(offset, len(piece), put(piece)) for offset, piece in pieces]
    digests = tuple(chunk.digest for chunk in chunks)
    if not chunks:
        return Content(bytes([_ALL_ZEROS]), ())
    if size <= CHUNK_BYTES_MAX:
        return Content(bytes([_ONE_OBJECT]) + digests[0], digests)
    listed = b"".join(_LISTED_CHUNK.pack(*chunk) for chunk in chunks)
    return Content(bytes([_CHUNKS]) + put(listed), digests)


def load_content(encoded: bytes, size: int, objects: Objects) -> Content:
    """Read the list of chunks behind an encoded content."""
    return Content(encoded, tuple(chunk.digest for chunk in chunks_of(encoded, size, objects)))


def chunks_of(encoded: bytes, size: int, objects: Objects) -> Iterator[Chunk]:
    """The stored chunks of a file of `size` bytes, ascending; what they leave out is zeros.

    Raises:
        Damaged: snapshot_damaged, also when they overlap or lie outside of the file.
    """
    if encoded[0] == _ONE_OBJECT:
        if size > CHUNK_BYTES_MAX:
            raise Damaged("snapshot_damaged", f"cannot read content: one object cannot hold {size} bytes")
        yield Chunk(0, size, encoded[1:])
    elif encoded[0] == _CHUNKS:
        end = 0
        try:
            for offset, length, digest in _LISTED_CHUNK.iter_unpack(objects.get(encoded[1:])):
                if offset < end or offset + length > size:
                    raise Damaged("snapshot_damaged", "cannot read content: its chunks do not fit the file")
                end = offset + length
                yield Chunk(offset, length, digest)
        except struct.error as error:
            raise Damaged("snapshot_damaged", "cannot read content: its list of chunks is cut short") from error


def read_chunk(chunk: Chunk, objects: Objects) -> bytes:
    """The bytes of a chunk.

    Raises:
        Damaged: snapshot_damaged, snapshot_object_missing.
    """
    data = objects.get(chunk.digest)
    if len(data) != chunk.length:
        raise Damaged("snapshot_damaged", f"cannot read content: a chunk has {len(data)} bytes, not {chunk.length}")
    return data
