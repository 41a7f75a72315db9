"""A pack: an array of items (pages or workspace objects) in small zstd frames, sealed under a key of its own and led by
the head that names it. A frame of pages may be a delta: compressed against other packs' pages, its bases.

Owns the pack's bytes (docs/snapshot-format.md) and their verification. A pack is immutable and is called after the
digest of its head, which is its sealed index; every section carries a tag, so whoever has the key can check every byte.
"""

import secrets
import struct
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import accumulate, pairwise

import zstandard

from torpor.core.errors import Damaged, NotFound
from torpor.snapshots.backend import Backend
from torpor.snapshots.cipher import KEY_BYTES, NONCE_BYTES, TAG_BYTES, Cipher, NotAuthentic
from torpor.snapshots.content_ids import OBJECT_ID_BYTES, PAGE_BYTES, PAGE_ID_BYTES, ContentIds

FRAME_BYTES = 262_144
PACK_BYTES_MAX = 16 * 1024 * 1024
_ITEM_BYTES_MAX = 1 << 30
_THREADS = 8
_HEAD = struct.Struct("<8sIQ")
_COUNTS = struct.Struct("<II")
HEAD_BYTES_MIN = _HEAD.size + _COUNTS.size + TAG_BYTES
"""Length of the head of a pack without items."""
_PAGES_MAGIC, _DELTAS_MAGIC, _OBJECTS_MAGIC = b"TORPAK2P", b"TORPAK3D", b"TORPAK2O"
_NAME_BYTES = 32
_NO_BASE = 0xFFFFFFFF
_DELTA_LEVEL = 3
"""Level 1 looks for matches too coarsely to find what a page has in common with its base."""
_DELTA_WINDOW_LOG = 21
"""A frame and its bases, a mebibyte each."""
# A delta that stores more than this share of its raw bytes is compared with the frame by itself, and has to store so
# much less than that: else its pages are better off as bases of later ones.
_DELTA_SHARE_SURE, _DELTA_OVER_PLAIN_MAX = 0.1, 0.8
# What a page stores by itself, as a share of its raw bytes, where nobody has tried: memory's is 0.25 to 0.3.
_PLAIN_SHARE = 0.27


@dataclass(frozen=True, slots=True)
class PackRef:
    """What it takes to read a pack: its name, the length of its head, its key."""

    name: bytes
    head_bytes: int
    secret: bytes = field(repr=False)

    @property
    def key(self) -> str:
        """Where it is in the store."""
        return pack_key(self.name)


def pack_key(name: bytes) -> str:
    return f"packs/{name.hex()}"


@dataclass(frozen=True, slots=True)
class Base:
    """What a delta frame is compressed against: for each of its pages another one, `places` (name of a page pack that
    is no delta there, item) and `raw`, their bytes.
    """

    places: Sequence[tuple[bytes, int]]
    raw: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One compressed and sealed run of whole items. `offset` and `stored_bytes` locate it in the pack."""

    number: int
    offset: int
    stored_bytes: int
    first_item: int
    items: int
    is_delta: bool


class PackIndex:
    """The verified index of one pack, and what opens its frames."""

    def __init__(self, ref: PackRef, head: bytes) -> None:
        """Open `head`, the pack's first `head_bytes` bytes.

        Raises:
            Damaged: snapshot_damaged.
        """
        if len(head) != ref.head_bytes or sha256(head).digest() != ref.name:
            raise damaged(ref.key, "its head is not what was written")
        self.ref = ref
        self._magic, _, self.stored_bytes = _HEAD.unpack_from(head)
        self._cipher = Cipher(ref.secret)
        self.holds_pages = self._magic in (_PAGES_MAGIC, _DELTAS_MAGIC)
        self.id_bytes = PAGE_ID_BYTES if self.holds_pages else OBJECT_ID_BYTES
        index = self._open(0, memoryview(head)[_HEAD.size :], "its index")
        self.items, frames = _COUNTS.unpack_from(index)
        cursor = _COUNTS.size
        stored = unpack_u32(index[cursor : cursor + 4 * frames])
        counts = unpack_u32(index[cursor + 4 * frames : cursor + 8 * frames])
        cursor += 8 * frames
        self._lengths: Sequence[int] = ()
        if not self.holds_pages:
            self._lengths = unpack_u32(index[cursor : cursor + 4 * self.items])
            cursor += 4 * self.items
        self.base_packs: tuple[bytes, ...] = ()
        """Names of the packs that its delta frames need."""
        self._bases: tuple[Sequence[int], Sequence[int]] = (), ()
        if self._magic == _DELTAS_MAGIC:
            cursor = self._read_bases(index, cursor)
        self.ids = index[cursor:]
        self._first_items = [0, *accumulate(counts)]
        offsets = list(accumulate(stored, initial=ref.head_bytes))
        self.frames = tuple(
            Frame(
                number=number,
                offset=offsets[number],
                stored_bytes=stored[number],
                first_item=self._first_items[number],
                items=counts[number],
                is_delta=bool(self.base_packs) and self._bases[0][self._first_items[number]] != _NO_BASE,
            )
            for number in range(frames)
        )

    def _read_bases(self, index: bytes, cursor: int) -> int:
        (packs,) = unpack_u32(index[cursor : cursor + 4])
        cursor, end = cursor + 4, cursor + 4 + _NAME_BYTES * packs
        self.base_packs = tuple(index[at : at + _NAME_BYTES] for at in range(cursor, end, _NAME_BYTES))
        middle, end_of_bases = end + 4 * self.items, end + 8 * self.items
        self._bases = unpack_u32(index[end:middle]), unpack_u32(index[middle:end_of_bases])
        return end_of_bases

    def frame_of(self, item: int) -> int:
        return bisect_right(self._first_items, item) - 1

    def ids_of(self, first: int, count: int) -> bytes:
        return self.ids[self.id_bytes * first : self.id_bytes * (first + count)]

    def bases_of(self, frame: Frame) -> list[tuple[int, int]]:
        """For each page of a delta frame its base: which of `base_packs`, and which item of that."""
        items = slice(frame.first_item, frame.first_item + frame.items)
        return list(zip(self._bases[0][items], self._bases[1][items], strict=True))

    def lengths_of(self, frame: Frame) -> Sequence[int]:
        """Raw length of each item of a frame."""
        if self.holds_pages:
            return [PAGE_BYTES] * frame.items
        return self._lengths[frame.first_item : frame.first_item + frame.items]

    def objects(self) -> Iterator[tuple[bytes, int]]:
        """Id and raw length of each object, in order."""
        for item, length in enumerate(self._lengths):
            yield self.ids_of(item, 1), length

    def split(self, frame: Frame, raw: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Id and bytes of each item of an opened frame."""
        ends = accumulate(self.lengths_of(frame), initial=0)
        for item, (start, end) in enumerate(pairwise(ends), frame.first_item):
            yield self.ids_of(item, 1), raw[start:end]

    def check(self, pack: bytes, ids: ContentIds, base_of: Callable[[Frame], bytes] = lambda _: b"") -> None:
        """Verify a whole pack: its length, each frame as it is stored, and each item after decompression.

        Args:
            base_of: the bytes that a delta frame was compressed against.

        Raises:
            Damaged: snapshot_damaged.
        """
        if len(pack) != self.stored_bytes:
            raise damaged(self.ref.key, f"it has {len(pack)} bytes, not {self.stored_bytes}")
        view = memoryview(pack)
        for frame in self.frames:
            stored = view[frame.offset : frame.offset + frame.stored_bytes]
            raw = memoryview(self.open_frame(frame, stored, base_of(frame) if frame.is_delta else b""))
            ends = list(accumulate(self.lengths_of(frame), initial=0))
            if self.holds_pages:
                found = ids.of_pages(raw)
            else:
                found = [ids.of_object(raw[ends[item] : ends[item + 1]]) for item in range(frame.items)]
            for item, content_id in enumerate(found, frame.first_item):
                if content_id != self.ids_of(item, 1):
                    raise damaged(self.ref.key, f"item {item} is not what was saved")

    def open_frame(self, frame: Frame, stored: bytes | memoryview, base: bytes | bytearray = b"") -> bytes:
        """Verify, decrypt and decompress the stored bytes of one of this pack's frames.

        Args:
            base: the bytes of a delta frame's bases.

        Raises:
            Damaged: snapshot_damaged, naming the pack and the frame.
        """
        name = f"frame {frame.number}"
        compressed = self._open(frame.number + 1, stored, name)
        length = PAGE_BYTES * frame.items if self.holds_pages else sum(self.lengths_of(frame))
        try:
            against = _against(base) if frame.is_delta else None
            raw = zstandard.ZstdDecompressor(dict_data=against).decompress(compressed, max_output_size=length)
        except zstandard.ZstdError as error:
            raise damaged(self.ref.key, f"{name} does not decompress") from error
        if len(raw) != length:
            raise damaged(self.ref.key, f"{name} has {len(raw)} bytes, not {length}")
        return raw

    def _open(self, section: int, sealed: bytes | memoryview, name: str) -> bytes:
        try:
            return self._cipher.open(_nonce(section), sealed, _about(self._magic, section))
        except NotAuthentic as error:
            raise damaged(self.ref.key, f"{name} is not what was written") from error


def _against(base: bytes | bytearray) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(bytes(base), dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def _nonce(section: int) -> bytes:
    """A pack's key is its own, and each section is sealed once: its number is all that is needed."""
    return section.to_bytes(NONCE_BYTES, "little")


def _about(magic: bytes, section: int) -> bytes:
    return magic + section.to_bytes(4, "little")


class PackBuilder:
    """Collects frames in memory; `finish` gives the pack's name and bytes.

    Attributes:
        delta_bytes: what its deltas store, of `delta_items` pages.
        plain_bytes: about what these would store by themselves.
        in_vain_bytes: what frames store that were to be deltas, and are none.
    """

    def __init__(self, ids: ContentIds, *, holds_pages: bool, level: int = 1) -> None:
        self._ids = ids
        self._holds_pages = holds_pages
        self._secret = secrets.token_bytes(KEY_BYTES)
        self._cipher = Cipher(self._secret)
        self._frames: list[tuple[bytes, Base | None]] = []
        self._compressor = zstandard.ZstdCompressor(level=level, write_content_size=True)
        self._counts: list[int] = []
        self._lengths: list[int] = []
        self._item_ids: list[bytes] = []
        self.stored_bytes = 0
        self.delta_bytes = 0
        self.plain_bytes = 0.0
        self.delta_items = 0
        self.in_vain_bytes = 0

    @property
    def items(self) -> int:
        return len(self._item_ids)

    def add_frame(
        self, raw: bytes, ids: Sequence[bytes], lengths: Sequence[int] = (), base: Base | None = None
    ) -> bool:
        """Add items whose bytes are concatenated in `raw`; `lengths` only for objects, `base` only for pages.

        Returns:
            Whether they became a delta: not if they store about as little by themselves.
        """
        if len(raw) > _ITEM_BYTES_MAX:
            raise ValueError(f"a frame of {len(raw)} bytes is too large")
        compressed, base = self._compressed(raw, base)
        self._frames.append((compressed, base))
        self._counts.append(len(ids))
        self._lengths += lengths
        self._item_ids += ids
        self.stored_bytes += len(compressed) + TAG_BYTES
        return base is not None

    def _compressed(self, raw: bytes, base: Base | None) -> tuple[bytes, Base | None]:
        if base is None:
            return self._compressor.compress(raw), None
        parameters = zstandard.ZstdCompressionParameters.from_level(  # pyright: ignore[reportUnknownMemberType]
            _DELTA_LEVEL,
            source_size=len(raw),
            dict_size=len(base.raw),
            window_log=_DELTA_WINDOW_LOG,
            write_content_size=True,
            write_checksum=True,
        )
        compressor = zstandard.ZstdCompressor(compression_params=parameters, dict_data=_against(base.raw))
        delta = compressor.compress(raw)
        plain_bytes = _PLAIN_SHARE * len(raw)
        if len(delta) > _DELTA_SHARE_SURE * len(raw):
            plain = self._compressor.compress(raw)
            plain_bytes = len(plain)
            if len(delta) > _DELTA_OVER_PLAIN_MAX * plain_bytes:
                self.in_vain_bytes += len(plain)
                return plain, None
        self.delta_bytes += len(delta)
        self.plain_bytes += plain_bytes
        self.delta_items += len(base.places)
        return delta, base

    def finish(self) -> tuple[PackIndex, bytes]:
        """The pack, read back once: what is stored decompresses to items that have their ids.

        So later reads need to check the stored bytes only, and a page can't be shared under a wrong id.

        Raises:
            Damaged: snapshot_damaged, if what was hashed changed before it was compressed, or memory is bad.
        """
        bases, magic = self._bases(), _OBJECTS_MAGIC
        if self._holds_pages:
            magic = _DELTAS_MAGIC if bases else _PAGES_MAGIC
        stored = [
            self._seal(magic, section, compressed) for section, (compressed, _) in enumerate(self._frames, start=1)
        ]
        index = b"".join(
            [
                _COUNTS.pack(len(self._item_ids), len(stored)),
                pack_u32([len(frame) for frame in stored]),
                pack_u32(self._counts),
                pack_u32(self._lengths),
                *bases,
                *self._item_ids,
            ]
        )
        sealed = self._seal(magic, 0, index)
        size = _HEAD.size + len(sealed) + self.stored_bytes
        head = _HEAD.pack(magic, len(sealed), size) + sealed
        pack = PackIndex(PackRef(sha256(head).digest(), len(head), self._secret), head)
        data = b"".join([head, *stored])
        raw_bases = {number: base.raw for number, (_, base) in enumerate(self._frames) if base is not None}
        pack.check(data, self._ids, lambda frame: raw_bases[frame.number])
        return pack, data

    def _bases(self) -> list[bytes]:
        """The part of the index that says what its delta frames are compressed against; nothing if there is none."""
        numbers: dict[bytes, int] = {}
        packs, items = array("I"), array("I")
        for count, (_, base) in zip(self._counts, self._frames, strict=True):
            places = base.places if base is not None else ()
            packs.extend([numbers.setdefault(name, len(numbers)) for name, _ in places] or [_NO_BASE] * count)
            items.extend([item for _, item in places] or [0] * count)
        return [pack_u32([len(numbers)]), *numbers, pack_u32(packs), pack_u32(items)] if numbers else []

    def _seal(self, magic: bytes, section: int, data: bytes) -> bytes:
        return self._cipher.seal(_nonce(section), data, _about(magic, section))


def read_pack_index(backend: Backend, ref: PackRef) -> PackIndex:
    """Raises Damaged: snapshot_object_missing or snapshot_damaged."""
    return PackIndex(ref, read_object(backend, ref.key, 0, ref.head_bytes))


def read_pack_indexes(refs: Sequence[PackRef], backend: Backend) -> list[PackIndex]:
    """Several at a time. Raises Damaged: snapshot_object_missing or snapshot_damaged."""
    if len(refs) < 2:
        return [read_pack_index(backend, ref) for ref in refs]
    with ThreadPoolExecutor(min(len(refs), _THREADS)) as threads:
        return list(threads.map(partial(read_pack_index, backend), refs))


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
