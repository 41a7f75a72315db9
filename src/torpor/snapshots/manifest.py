"""The manifest of a snapshot: a head that anybody can read, which names its packs, and a body under the session's key.

Owns the manifest's bytes (docs/snapshot-format.md). Pins are opaque here: the layers above say what they mean and check
them.
"""

import secrets
import struct
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import msgspec
import zstandard

from torpor.core.errors import Damaged, NotFound
from torpor.core.ids import KeyId, SnapshotId
from torpor.snapshots.backend import Backend
from torpor.snapshots.cipher import (
    KEY_ID_BYTES,
    NONCE_BYTES,
    Cipher,
    Key,
    NotAuthentic,
    derive,
    key_id_bytes,
    key_id_of_bytes,
)
from torpor.snapshots.pack import PackRef, damaged, missing, pack_key, pack_u32, unpack_u32
from torpor.snapshots.pages import Extent

VERSION = 3
_READABLE = (2, VERSION)
_MAGIC = b"TORPORMF"
_HEAD = struct.Struct(f"<8sHHII{KEY_ID_BYTES}s{NONCE_BYTES}s")
_NAME_BYTES = 32
_VERSION_1_MAGIC = zstandard.FRAME_HEADER
_RAW_BYTES_MAX = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRef:
    """What it takes to read a snapshot.

    Attributes:
        manifest_digest: SHA-256 (hex) of its manifest, as its save gave it.
        key: of its session.
    """

    id: SnapshotId
    manifest_digest: str
    key: Key


class PagedFile(msgspec.Struct, frozen=True, array_like=True, tag="paged"):
    """A memory image: `page_list` is the digest of its pages' 16-byte ids in order."""

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
    parent: str | None
    pins: dict[str, str]
    page_packs: list[tuple[int, bytes]]
    object_packs: list[tuple[int, bytes]]
    files: list[PagedFile | WholeFile]
    tree_root: bytes
    tree_bytes: int
    needs: list[tuple[int, ...]] = []
    debt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestHead:
    """What a manifest says without any key.

    Attributes:
        key_id: of the key that opens the body.
        page_packs, object_packs: names of the packs that the snapshot needs.
        size: of the head, in bytes.
    """

    snapshot_id: SnapshotId
    key_id: KeyId
    page_packs: tuple[bytes, ...]
    object_packs: tuple[bytes, ...]
    nonce: bytes = field(repr=False)
    size: int

    @property
    def pack_names(self) -> tuple[str, ...]:
        """Of all packs, as the backend calls them."""
        return tuple(pack_key(name) for name in (*self.page_packs, *self.object_packs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Attributes:
    page_packs: those of the image, and those that its deltas need.
    needs: for each of `page_packs` the numbers of those that its deltas need.
    debt: bytes that deltas cost since the image was last stored whole, more than they would have right after it.
    """

    snapshot_id: SnapshotId
    parent: SnapshotId | None
    pins: dict[str, str]
    page_packs: tuple[PackRef, ...]
    object_packs: tuple[PackRef, ...]
    files: tuple[PagedFile | WholeFile, ...]
    tree_root: bytes
    tree_bytes: int
    needs: tuple[tuple[int, ...], ...] = ()
    debt: int = 0

    @property
    def packs(self) -> tuple[PackRef, ...]:
        return self.page_packs + self.object_packs

    @property
    def raw_bytes(self) -> int:
        """What a restore writes."""
        return sum(file.size for file in self.files) + self.tree_bytes


def manifest_key(snapshot_id: SnapshotId) -> str:
    """Where it is in the store."""
    return f"manifests/{snapshot_id}"


def encode_manifest(manifest: Manifest, key: Key) -> bytes:
    body = _Body(
        parent=manifest.parent,
        pins=manifest.pins,
        page_packs=[(ref.head_bytes, ref.secret) for ref in manifest.page_packs],
        object_packs=[(ref.head_bytes, ref.secret) for ref in manifest.object_packs],
        files=list(manifest.files),
        tree_root=manifest.tree_root,
        tree_bytes=manifest.tree_bytes,
        needs=list(manifest.needs),
        debt=manifest.debt,
    )
    nonce, name = secrets.token_bytes(NONCE_BYTES), manifest.snapshot_id.encode()
    counts = len(name), len(manifest.page_packs), len(manifest.object_packs)
    fixed = _HEAD.pack(_MAGIC, VERSION, *counts, key_id_bytes(key.id), nonce)
    head = b"".join([fixed, name, *(ref.name for ref in manifest.packs)])
    raw = zstandard.ZstdCompressor(level=3).compress(msgspec.msgpack.encode(body))
    return head + _cipher(key).seal(nonce, raw, head)


def decode_head(snapshot_id: SnapshotId, data: bytes) -> ManifestHead:
    """Read a manifest's head, which is as true as `data` is: only a digest or the key can tell.

    Raises:
        Damaged: snapshot_damaged, snapshot_version_unknown.
    """
    where = manifest_key(snapshot_id)
    if data.startswith(_VERSION_1_MAGIC):
        raise _of_version(where, 1)
    if len(data) < _HEAD.size or not data.startswith(_MAGIC):
        raise damaged(where, "it is no manifest")
    _, version, name_bytes, page_packs, object_packs, key_id, nonce = _HEAD.unpack_from(data)
    if version not in _READABLE:
        raise _of_version(where, version)
    names_at = _HEAD.size + name_bytes
    size = names_at + _NAME_BYTES * (page_packs + object_packs)
    if len(data) < size:
        raise damaged(where, "it is cut short")
    name = data[_HEAD.size : names_at]
    if name != snapshot_id.encode():
        raise damaged(where, f"it is the manifest of {name.decode(errors='backslashreplace')}")
    names = tuple(data[at : at + _NAME_BYTES] for at in range(names_at, size, _NAME_BYTES))
    return ManifestHead(
        snapshot_id=snapshot_id,
        key_id=key_id_of_bytes(key_id),
        page_packs=names[:page_packs],
        object_packs=names[page_packs:],
        nonce=nonce,
        size=size,
    )


def decode_manifest(snapshot_id: SnapshotId, data: bytes, key: Key) -> Manifest:
    """Open a manifest.

    Raises:
        Damaged: snapshot_damaged, snapshot_version_unknown, snapshot_key_wrong.
    """
    where = manifest_key(snapshot_id)
    head = decode_head(snapshot_id, data)
    if head.key_id != key.id:
        raise Damaged(
            "snapshot_key_wrong",
            f"cannot read {where}: it is sealed with {head.key_id}, not with {key.id}",
            hint="A snapshot opens with the key of the session that made it.",
        )
    try:
        raw = _cipher(key).open(head.nonce, memoryview(data)[head.size :], data[: head.size])
        packed = zstandard.ZstdDecompressor().decompress(raw, max_output_size=_RAW_BYTES_MAX)
        body = msgspec.msgpack.decode(packed, type=_Body)
    except NotAuthentic as error:
        raise damaged(where, "it is not what its key sealed") from error
    except (zstandard.ZstdError, msgspec.MsgspecError) as error:
        raise damaged(where, "it does not decode") from error
    if any("/" in file.name or file.name in ("", ".", "..") for file in body.files):
        raise damaged(where, "a file of its image has a name that could lead elsewhere")
    return Manifest(
        snapshot_id=snapshot_id,
        parent=None if body.parent is None else SnapshotId(body.parent),
        pins=body.pins,
        page_packs=_refs(where, head.page_packs, body.page_packs),
        object_packs=_refs(where, head.object_packs, body.object_packs),
        files=tuple(body.files),
        tree_root=body.tree_root,
        tree_bytes=body.tree_bytes,
        needs=tuple(body.needs),
        debt=body.debt,
    )


def load_manifest(backend: Backend, ref: SnapshotRef) -> Manifest:
    """Read a manifest and open it.

    Raises:
        Damaged: snapshot_object_missing, snapshot_damaged, snapshot_version_unknown, snapshot_key_wrong.
    """
    return decode_manifest(ref.id, _read(backend, ref.id, ref.manifest_digest), ref.key)


def load_head(backend: Backend, snapshot_id: SnapshotId, manifest_digest: str | None) -> ManifestHead:
    """Read what a manifest says without any key; without a digest it may have been written by anybody.

    Raises:
        Damaged: snapshot_object_missing, snapshot_damaged, snapshot_version_unknown.
    """
    return decode_head(snapshot_id, _read(backend, snapshot_id, manifest_digest))


def _read(backend: Backend, snapshot_id: SnapshotId, manifest_digest: str | None) -> bytes:
    where = manifest_key(snapshot_id)
    try:
        data = backend.get(where)
    except NotFound as error:
        raise missing(where) from error
    if manifest_digest is not None and sha256(data).hexdigest() != manifest_digest:
        decode_head(snapshot_id, data)  # It may say better what is wrong.
        raise damaged(where, "it is not what was written")
    return data


def _cipher(key: Key) -> Cipher:
    return Cipher(derive(key.secret, "manifest"))


def _refs(where: str, names: Sequence[bytes], rest: Sequence[tuple[int, bytes]]) -> tuple[PackRef, ...]:
    if len(names) != len(rest):
        raise damaged(where, "its head and its body name different packs")
    return tuple(PackRef(name, *pair) for name, pair in zip(names, rest, strict=True))


def _of_version(where: str, version: int) -> Damaged:
    return Damaged(
        "snapshot_version_unknown",
        f"cannot read {where}: it has version {version} of the format, this Torpor reads up to version {VERSION}",
        hint="Nothing of version 1 was ever released; of a later one, install the Torpor that wrote it.",
    )


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
    ends: defaultdict[int, int] = defaultdict(int)
    for count, pack, distance in zip(*columns, strict=True):
        first = (distance + ends[pack]) & 0xFFFFFFFF
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
