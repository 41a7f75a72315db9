"""A pack: an array of items (pages or workspace objects) in small zstd frames, led by the index that names
it.

Owns the pack's bytes (docs/snapshot-format.md) and their verification. A pack is immutable and is called
after the digest of its index, which holds the digest of every frame: whoever knows the name can check every
byte.
"""

import struct
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate

import zstandard

from torpor.core.errors import Damaged, NotFound
from torpor.snapshots.backend import Backend

PAGE_BYTES = 4096
FRAME_BYTES = 262_144
PACK_BYTES_MAX = 16 * 1024 * 1024
DIGEST_BYTES = 32
PAGE_DIGEST_BYTES = 16
_ITEM_BYTES_MAX = 1 << 30
_HEADER = struct.Struct("<8sII")
_PAGES_MAGIC, _OBJECTS_MAGIC = b"TORPAK1P", b"TORPAK1O"


@dataclass(frozen=True, slots=True)
class PackRef:
    """A pack's name and the length of the index at its start."""

    digest: bytes
    index_bytes: int

    @property
    def key(self) -> str:
        return f"packs/{self.digest.hex()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One compressed run of whole items. `offset` and `stored_bytes` locate it in the pack."""

    offset: int
    stored_bytes: int
    digest: bytes
    first_item: int
    items: int


class PackIndex:
    """The verified index of one pack."""

    def __init__(self, ref: PackRef, data: bytes) -> None:
        """Parse `data`, the pack's first `index_bytes` bytes.

        Raises:
            Damaged: snapshot_damaged.
        """
        if len(data) != ref.index_bytes or sha256(data).digest() != ref.digest:
            raise damaged(ref.key, "its index is not what was written")
        magic, items, frames = _HEADER.unpack_from(data)
        self.ref = ref
        self.holds_pages = magic == _PAGES_MAGIC
        cursor = _HEADER.size
        stored = unpack_u32(data[cursor : cursor + 4 * frames])
        counts = unpack_u32(data[cursor + 4 * frames : cursor + 8 * frames])
        cursor += 8 * frames
        digests = data[cursor : cursor + DIGEST_BYTES * frames]
        cursor += DIGEST_BYTES * frames
        self._lengths: Sequence[int] = ()
        if not self.holds_pages:
            self._lengths = unpack_u32(data[cursor : cursor + 4 * items])
            cursor += 4 * items
        self.digest_bytes = PAGE_DIGEST_BYTES if self.holds_pages else DIGEST_BYTES
        self.digests = data[cursor:]
        self.items = items
        self._first_items = [0, *accumulate(counts)]
        offsets = [ref.index_bytes, *accumulate(stored, initial=ref.index_bytes)][1:]
        self.stored_bytes = offsets[-1]
        self.frames = tuple(
            Frame(
                offset=offsets[number],
                stored_bytes=stored[number],
                digest=digests[DIGEST_BYTES * number : DIGEST_BYTES * (number + 1)],
                first_item=self._first_items[number],
                items=counts[number],
            )
            for number in range(frames)
        )

    def frame_of(self, item: int) -> int:
        return bisect_right(self._first_items, item) - 1

    def digests_of(self, first: int, count: int) -> bytes:
        return self.digests[self.digest_bytes * first : self.digest_bytes * (first + count)]

    def lengths_of(self, frame: Frame) -> Sequence[int]:
        """Raw length of each item of a frame."""
        if self.holds_pages:
            return [PAGE_BYTES] * frame.items
        return self._lengths[frame.first_item : frame.first_item + frame.items]

    def objects(self) -> Iterator[tuple[bytes, int]]:
        """Digest and raw length of each object, in order."""
        for item, length in enumerate(self._lengths):
            yield self.digests_of(item, 1), length

    def check(self, pack: bytes) -> None:
        """Verify a whole pack: its length, each frame as it is stored, and each item after decompression.

        Raises:
            Damaged: snapshot_damaged.
        """
        if len(pack) != self.stored_bytes:
            raise damaged(self.ref.key, f"it has {len(pack)} bytes, not {self.stored_bytes}")
        view = memoryview(pack)
        for frame in self.frames:
            raw = memoryview(self.open_frame(frame, view[frame.offset : frame.offset + frame.stored_bytes]))
            at = 0
            for item, length in enumerate(self.lengths_of(frame), frame.first_item):
                if sha256(raw[at : at + length]).digest()[: self.digest_bytes] != self.digests_of(item, 1):
                    raise damaged(self.ref.key, f"item {item} is not what was saved")
                at += length

    def open_frame(self, frame: Frame, stored: bytes | memoryview) -> bytes:
        """Verify and decompress the stored bytes of one of this pack's frames.

        Raises:
            Damaged: snapshot_damaged, naming the pack and the frame.
        """
        name = f"frame {self.frame_of(frame.first_item)}"
        if len(stored) != frame.stored_bytes or sha256(stored).digest() != frame.digest:
            raise damaged(self.ref.key, f"{name} is not what was written")
        length = PAGE_BYTES * frame.items if self.holds_pages else sum(self.lengths_of(frame))
        try:
            raw = zstandard.ZstdDecompressor().decompress(stored, max_output_size=length)
        except zstandard.ZstdError as error:
            raise damaged(self.ref.key, f"{name} does not decompress") from error
        if len(raw) != length:
            raise damaged(self.ref.key, f"{name} has {len(raw)} bytes, not {length}")
        return raw


class PackBuilder:
    """Collects frames in memory; `finish` gives the pack's name and bytes."""

    def __init__(self, *, holds_pages: bool, level: int = 1) -> None:
        self._holds_pages = holds_pages
        self._compressor = zstandard.ZstdCompressor(level=level, write_content_size=True)
        self._stored: list[bytes] = []
        self._counts: list[int] = []
        self._lengths: list[int] = []
        self._digests: list[bytes] = []
        self.stored_bytes = 0

    @property
    def items(self) -> int:
        return len(self._digests)

    def add_frame(self, raw: bytes, digests: Sequence[bytes], lengths: Sequence[int] = ()) -> None:
        """Add items whose bytes are concatenated in `raw`; `lengths` only for objects."""
        if len(raw) > _ITEM_BYTES_MAX:
            raise ValueError(f"a frame of {len(raw)} bytes is too large")
        stored = self._compressor.compress(raw)
        self._stored.append(stored)
        self._counts.append(len(digests))
        self._lengths += lengths
        self._digests += digests
        self.stored_bytes += len(stored)

    def finish(self) -> tuple[PackIndex, bytes]:
        """The pack, read back once: what is stored decompresses to items that have their digests.

        So later reads need to check the stored bytes only, and a page can't be shared under a wrong digest.

        Raises:
            Damaged: snapshot_damaged, if what was hashed changed before it was compressed, or memory is bad.
        """
        magic = _PAGES_MAGIC if self._holds_pages else _OBJECTS_MAGIC
        index = b"".join(
            [
                _HEADER.pack(magic, len(self._digests), len(self._stored)),
                pack_u32([len(stored) for stored in self._stored]),
                pack_u32(self._counts),
                *(sha256(stored).digest() for stored in self._stored),
                pack_u32(self._lengths),
                *self._digests,
            ]
        )
        pack = PackIndex(PackRef(sha256(index).digest(), len(index)), index)
        data = b"".join([index, *self._stored])
        pack.check(data)
        return pack, data


def read_pack_index(backend: Backend, ref: PackRef) -> PackIndex:
    """Raises Damaged: snapshot_object_missing or snapshot_damaged."""
    return PackIndex(ref, read_object(backend, ref.key, 0, ref.index_bytes))


def read_object(backend: Backend, key: str, start: int, length: int) -> bytes:
    """A range of an object that must exist. Raises Damaged: snapshot_object_missing."""
    try:
        return backend.get_range(key, start, length)
    except NotFound as error:
        raise missing(key) from error


def damaged(what: str, reason: str) -> Damaged:
    return Damaged(
        "snapshot_damaged",
        f"cannot read {what}: {reason}",
        hint="An older checkpoint of the session may still restore.",
    )


def missing(key: str) -> Damaged:
    return Damaged(
        "snapshot_object_missing",
        f"cannot read {key}: it is not in the store",
        hint="An older checkpoint of the session may still restore.",
    )


def pack_u32(values: Sequence[int]) -> bytes:
    column = array("I", values)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def unpack_u32(data: bytes) -> "array[int]":
    column = array("I", data)
    if sys.byteorder == "big":
        column.byteswap()
    return column
