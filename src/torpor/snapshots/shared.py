"""What a session's first snapshots are compared with: pages and objects of an earlier session of the same image.

Small files of this machine, sealed with the tenant's key (docs/snapshot-format.md). Lossy: one that is lost, half
written or stale costs deduplication and nothing else. Which sessions share a name is for the caller to say.
"""

import contextlib
import hmac
import secrets
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zstandard

from torpor.snapshots.atomic import write_atomic
from torpor.snapshots.backend import storage_errors
from torpor.snapshots.cipher import NONCE_BYTES, Cipher, NotAuthentic, derive
from torpor.snapshots.content_ids import PAGE_ID_BYTES
from torpor.snapshots.manifest import decode_extents, encode_extents
from torpor.snapshots.pack import PackRef
from torpor.snapshots.pages import EMPTY_INDEX, PageIndex, extents_of

PAGES_MAX = 65_536
_VERSION = 3
_MAGIC = b"TORPORSI"
_HEAD = struct.Struct(f"<8sHH{NONCE_BYTES}s")
_RAW_BYTES_MAX = 64 * 1024 * 1024


class _Body(msgspec.Struct, frozen=True, array_like=True):
    page_packs: list[tuple[bytes, int, bytes]]
    object_packs: list[tuple[bytes, int, bytes]]
    ids: bytes
    extents: bytes
    bases: bytes
    needs: list[tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What may be referred to instead of stored again, as far as its packs are still there."""

    pages: PageIndex
    object_packs: tuple[PackRef, ...]


NOTHING_SHARED = Shared(pages=EMPTY_INDEX, object_packs=())


class SharedIndexes:
    """The files of one tenant, one for each name that sessions go by."""

    def __init__(self, directory: Path, tenant_secret: bytes) -> None:
        secret = derive(tenant_secret, "shared index")
        self._directory = directory
        self._cipher = Cipher(secret)
        self._names_key = derive(secret, "names")

    def find(self, names: Sequence[str]) -> Shared:
        """What is known by the first of these names that something is known by."""
        for name in names:
            path = self._path(name)
            with contextlib.suppress(OSError):
                found = self._decode(path.name, path.read_bytes())
                if found is not None:
                    return found
        return NOTHING_SHARED

    def write(self, name: str, origin: str, shared: Shared) -> None:
        """Let sessions that go by `name` share this, until `origin` is dropped.

        Raises:
            MachineUnfit: no_space, storage_failed.
        """
        path = self._path(name)
        with storage_errors(f"write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(path, self._encode(path.name, origin, shared), durable=False)

    def _path(self, name: str) -> Path:
        return self._directory / hmac.digest(self._names_key, name.encode(), "sha256")[:16].hex()

    def _encode(self, file_name: str, origin: str, shared: Shared) -> bytes:
        pages = _first_pages(shared.pages)
        body = _Body(
            page_packs=[(ref.name, ref.head_bytes, ref.secret) for ref in pages.packs],
            object_packs=[(ref.name, ref.head_bytes, ref.secret) for ref in shared.object_packs],
            ids=pages.ids,
            extents=encode_extents(extents_of(pages.places)),
            bases=encode_extents(extents_of(pages.bases)),
            needs=list(pages.needs),
        )
        nonce = secrets.token_bytes(NONCE_BYTES)
        head = _HEAD.pack(_MAGIC, _VERSION, len(origin), nonce) + origin.encode()
        raw = zstandard.ZstdCompressor(level=1).compress(msgspec.msgpack.encode(body))
        return head + self._cipher.seal(nonce, raw, file_name.encode() + head)

    def _decode(self, file_name: str, data: bytes) -> Shared | None:
        """None for what is no file of ours."""
        try:
            _, version, origin_bytes, nonce = _HEAD.unpack_from(data)
            if version != _VERSION:
                return None
            head = data[: _HEAD.size + origin_bytes]
            raw = self._cipher.open(nonce, memoryview(data)[len(head) :], file_name.encode() + head)
            packed = zstandard.ZstdDecompressor().decompress(raw, max_output_size=_RAW_BYTES_MAX)
            body = msgspec.msgpack.decode(packed, type=_Body)
        except (struct.error, NotAuthentic, zstandard.ZstdError, msgspec.MsgspecError):
            return None
        refs = tuple(PackRef(*ref) for ref in body.page_packs)
        pages = PageIndex(refs, body.ids, _places(body.extents), _places(body.bases), tuple(body.needs))
        return Shared(pages=pages, object_packs=tuple(PackRef(*ref) for ref in body.object_packs))


def _places(extents: bytes) -> "array[int]":
    places = array("Q")
    for extent in decode_extents(extents):
        places.extend(range(extent.place, extent.place + extent.count))
    return places


def drop_shared(directory: Path, origin: str) -> None:
    """Remove every file that is of this origin; takes no key.

    Raises:
        MachineUnfit: storage_failed.
    """
    with storage_errors(f"remove shared indexes in {directory}"):
        for path, of in _origins(directory):
            if of == origin:
                path.unlink(missing_ok=True)


def _origins(directory: Path) -> Iterator[tuple[Path, str]]:
    """Every file with its origin, also those that a crash left in the middle of their writing."""
    for path in directory.iterdir() if directory.is_dir() else ():
        with contextlib.suppress(FileNotFoundError, struct.error), path.open("rb") as file:
            _, _, origin_bytes, _ = _HEAD.unpack(file.read(_HEAD.size))
            yield path, file.read(origin_bytes).decode(errors="replace")


def _first_pages(pages: PageIndex) -> PageIndex:
    """At most PAGES_MAX pages, and the packs that those need."""
    places, bases = pages.places[:PAGES_MAX], pages.bases[:PAGES_MAX]
    held = {place >> 32 for place in places}
    used = sorted(held.union(*(pages.needs[pack] for pack in held)))
    number = {pack: at for at, pack in enumerate(used)}
    moved, moved_bases = (
        array("Q", [number[place >> 32] << 32 | place & 0xFFFFFFFF for place in column]) for column in (places, bases)
    )
    needs = tuple(tuple(number[at] for at in pages.needs[pack]) if pack in held else () for pack in used)
    refs = tuple(pages.packs[pack] for pack in used)
    return PageIndex(refs, pages.ids[: PAGE_ID_BYTES * len(places)], moved, moved_bases, needs)
