"""A manifest: all that one snapshot needs to be restored, flat and self-contained, under one digest.

Owns its bytes (docs/snapshot-format.md). Pins are opaque here: the layers above say what they mean and check
them.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import msgspec
import zstandard

from torpor.core.errors import NotFound
from torpor.core.ids import SnapshotId
from torpor.snapshots.backend import Backend
from torpor.snapshots.pack import PackRef, damaged, missing, pack_u32, unpack_u32
from torpor.snapshots.pages import Extent

VERSION = 1
_RAW_BYTES_MAX = 256 * 1024 * 1024


class PagedFile(msgspec.Struct, frozen=True, array_like=True, tag="paged"):
    """A memory image: `page_list` is the digest of its pages' 16-byte digests in order."""

    name: str
    size: int
    page_list: bytes
    extents: bytes


class WholeFile(msgspec.Struct, frozen=True, array_like=True, tag="whole"):
    """A small file of the image; `content` as in a directory entry."""

    name: str
    size: int
    content: bytes


class _Body(msgspec.Struct, frozen=True, array_like=True):
    version: int
    snapshot_id: str
    parent: str | None
    pins: dict[str, str]
    page_packs: list[tuple[bytes, int]]
    object_packs: list[tuple[bytes, int]]
    files: list[PagedFile | WholeFile]
    tree_root: bytes
    tree_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    snapshot_id: SnapshotId
    parent: SnapshotId | None
    pins: dict[str, str]
    page_packs: tuple[PackRef, ...]
    object_packs: tuple[PackRef, ...]
    files: tuple[PagedFile | WholeFile, ...]
    tree_root: bytes
    tree_bytes: int

    @property
    def packs(self) -> tuple[PackRef, ...]:
        return self.page_packs + self.object_packs

    @property
    def raw_bytes(self) -> int:
        """What a restore writes."""
        return sum(file.size for file in self.files) + self.tree_bytes


def manifest_key(snapshot_id: SnapshotId) -> str:
    return f"manifests/{snapshot_id}"


def encode_manifest(manifest: Manifest) -> bytes:
    body = _Body(
        version=VERSION,
        snapshot_id=manifest.snapshot_id,
        parent=manifest.parent,
        pins=manifest.pins,
        page_packs=[(ref.digest, ref.index_bytes) for ref in manifest.page_packs],
        object_packs=[(ref.digest, ref.index_bytes) for ref in manifest.object_packs],
        files=list(manifest.files),
        tree_root=manifest.tree_root,
        tree_bytes=manifest.tree_bytes,
    )
    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(msgspec.msgpack.encode(body))


def decode_manifest(snapshot_id: SnapshotId, data: bytes) -> Manifest:
    """Raises Damaged: snapshot_damaged."""
    key = manifest_key(snapshot_id)
    try:
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=_RAW_BYTES_MAX)
        body = msgspec.msgpack.decode(raw, type=_Body)
    except (zstandard.ZstdError, msgspec.MsgspecError) as error:
        raise damaged(key, "it does not decode") from error
    if body.version != VERSION:
        raise damaged(key, f"its version is {body.version}, this Torpor reads {VERSION}")
    if body.snapshot_id != snapshot_id:
        raise damaged(key, f"it is the manifest of {body.snapshot_id}")
    if any("/" in file.name or file.name in ("", ".", "..") for file in body.files):
        raise damaged(key, "a file of its image has a name that could lead elsewhere")
    return Manifest(
        snapshot_id=snapshot_id,
        parent=None if body.parent is None else SnapshotId(body.parent),
        pins=body.pins,
        page_packs=tuple(PackRef(*ref) for ref in body.page_packs),
        object_packs=tuple(PackRef(*ref) for ref in body.object_packs),
        files=tuple(body.files),
        tree_root=body.tree_root,
        tree_bytes=body.tree_bytes,
    )


def load_manifest(backend: Backend, snapshot_id: SnapshotId, digest: bytes | None) -> Manifest:
    """Read a manifest; without a digest only its own consistency is checked.

    Raises:
        Damaged: snapshot_object_missing or snapshot_damaged.
    """
    key = manifest_key(snapshot_id)
    try:
        data = backend.get(key)
    except NotFound as error:
        raise missing(key) from error
    if digest is not None and sha256(data).digest() != digest:
        raise damaged(key, "it is not what was written")
    return decode_manifest(snapshot_id, data)


def packs_named(backend: Backend, key: str) -> frozenset[str]:
    """Keys of the packs that a manifest needs, given its own key.

    Raises:
        NotFound: object_not_found.
        Damaged: snapshot_damaged.
    """
    manifest = decode_manifest(SnapshotId(key.removeprefix("manifests/")), backend.get(key))
    return frozenset(ref.key for ref in manifest.packs)


def encode_extents(extents: Iterable[Extent]) -> bytes:
    """Three columns as byte planes; a first item is written as its distance from the last extent's end."""
    counts, packs, distances = array("I"), array("I"), array("I")
    ends: dict[int, int] = {}
    for extent in extents:
        counts.append(extent.count)
        packs.append(extent.pack)
        distances.append((extent.first - ends.get(extent.pack, 0)) & 0xFFFFFFFF)
        ends[extent.pack] = extent.first + extent.count
    return b"".join(_planes(pack_u32(column)) for column in (counts, packs, distances))


def decode_extents(data: bytes) -> list[Extent]:
    third = len(data) // 3
    columns: Sequence[Any] = [unpack_u32(_unplanes(data[at * third : (at + 1) * third])) for at in range(3)]
    extents: list[Extent] = []
    ends: dict[int, int] = {}
    for count, pack, distance in zip(*columns, strict=True):
        first = (distance + ends.get(pack, 0)) & 0xFFFFFFFF
        ends[pack] = first + count
        extents.append(Extent(count, pack, first))
    return extents


def _planes(column: bytes) -> bytes:
    """First the lowest byte of each number, then the second of each, ...: like bytes side by side compress
    better.
    """
    return b"".join(column[byte::4] for byte in range(4))


def _unplanes(planes: bytes) -> bytes:
    column = bytearray(len(planes))
    quarter = len(planes) // 4
    for byte in range(4):
        column[byte::4] = planes[byte * quarter : (byte + 1) * quarter]
    return bytes(column)
