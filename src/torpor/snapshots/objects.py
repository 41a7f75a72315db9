"""Content-addressed objects (blocks of files, lists of blocks, directories) in object packs, and file
contents over them.

Owns how a file's bytes become blocks and back. An object is stored once. What is called a digest here is an object's
id, which is a digest under the tenant's key (content_ids.py).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

from torpor.core.crash import crash_point
from torpor.core.errors import Damaged
from torpor.snapshots.backend import Backend
from torpor.snapshots.content_ids import OBJECT_ID_BYTES, ContentIds
from torpor.snapshots.pack import (
    FRAME_BYTES,
    PACK_BYTES_MAX,
    PackBuilder,
    PackIndex,
    damaged,
    read_object,
)

BLOCK_BYTES = FRAME_BYTES
_BLOCK_ENTRY_BYTES = 4 + OBJECT_ID_BYTES
_FRAMES_CACHED = 64
_NO_BLOCK, _ONE_BLOCK, _LISTED = range(3)


class Objects(Protocol):
    """Reads objects by digest."""

    def get(self, digest: bytes) -> bytes:
        """Raises Damaged."""
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
    """Objects of some packs; the frames read last stay in memory, since neighbours are read together."""

    def __init__(self, backend: Backend, ids: ContentIds, packs: Sequence[PackIndex]) -> None:
        self._backend = backend
        self._ids = ids
        self._packs = packs
        self._places = places_of_objects(packs)
        self._frames: OrderedDict[tuple[int, int], dict[bytes, bytes]] = OrderedDict()

    def get(self, digest: bytes) -> bytes:
        place = self._places.get(digest)
        if place is None:
            raise damaged(f"object {digest.hex()}", "no pack of the snapshot holds it")
        pack, item = place >> 32, place & 0xFFFFFFFF
        key = pack, self._packs[pack].frame_of(item)
        frame = self._frames.get(key)
        if frame is None:
            frame = self._frames[key] = self._read_frame(*key)
            if len(self._frames) > _FRAMES_CACHED:
                self._frames.popitem(last=False)
        else:
            self._frames.move_to_end(key)
        return frame[digest]

    def digest_of(self, data: bytes) -> bytes:
        return self._ids.of_object(data)

    def _read_frame(self, pack_number: int, frame_number: int) -> dict[bytes, bytes]:
        pack = self._packs[pack_number]
        frame = pack.frames[frame_number]
        raw = pack.open_frame(frame, read_object(self._backend, pack.ref.key, frame.offset, frame.stored_bytes))
        ends = list(accumulate(pack.lengths_of(frame), initial=0))
        return {
            pack.ids_of(item, 1): raw[start:end] for item, (start, end) in enumerate(pairwise(ends), frame.first_item)
        }


def places_of_objects(packs: Sequence[PackIndex]) -> dict[bytes, int]:
    """pack << 32 | item of every object."""
    places: dict[bytes, int] = {}
    for number, pack in enumerate(packs):
        for item in range(pack.items):
            places[pack.ids_of(item, 1)] = number << 32 | item
    return places


@dataclass(frozen=True, slots=True)
class Content:
    """A file's bytes: `encoded` is what stands for them in a directory or manifest, `blocks` the digests
    behind it.
    """

    encoded: bytes
    blocks: tuple[bytes, ...]

    @property
    def objects(self) -> tuple[bytes, ...]:
        """Digests of all objects that a reader of this content needs."""
        return (*self.blocks, self.encoded[1:]) if self.encoded[0] == _LISTED else self.blocks


def content_bytes(layout: int) -> int:
    """Length of the encoding that starts with this layout byte."""
    if layout > _LISTED:
        raise Damaged("snapshot_damaged", f"cannot read content: layout {layout} is unknown")
    return 1 if layout == _NO_BLOCK else 1 + OBJECT_ID_BYTES


def store_content(blocks: Iterable[tuple[int, bytes]], size: int, put: Callable[[bytes], bytes]) -> Content:
    """Store the numbered blocks of a file of `size` bytes; blocks of zeros need not be given."""
    stored = [(number, put(block)) for number, block in blocks if block.count(0) != len(block)]
    digests = tuple(digest for _, digest in stored)
    if not stored:
        return Content(bytes([_NO_BLOCK]), ())
    if size <= BLOCK_BYTES:
        return Content(bytes([_ONE_BLOCK]) + digests[0], digests)
    listed = b"".join(number.to_bytes(4, "little") + digest for number, digest in stored)
    return Content(bytes([_LISTED]) + put(listed), digests)


def load_content(encoded: bytes, objects: Objects) -> Content:
    """Read the list of blocks behind an encoded content."""
    return Content(encoded, tuple(digest for _, digest in block_numbers(encoded, objects)))


def block_numbers(encoded: bytes, objects: Objects) -> Iterator[tuple[int, bytes]]:
    """(number, digest) of each stored block, ascending."""
    if encoded[0] == _ONE_BLOCK:
        yield 0, encoded[1:]
    elif encoded[0] == _LISTED:
        listed = objects.get(encoded[1:])
        for at in range(0, len(listed), _BLOCK_ENTRY_BYTES):
            entry = listed[at : at + _BLOCK_ENTRY_BYTES]
            yield int.from_bytes(entry[:4], "little"), entry[4:]


def has_blocks(encoded: bytes, blocks: Iterable[tuple[int, bytes]], objects: Objects) -> bool:
    """Whether these blocks of a file of the same size are the content."""
    there = ((number, objects.digest_of(block)) for number, block in blocks if block.count(0) != len(block))
    return list(there) == list(block_numbers(encoded, objects))
