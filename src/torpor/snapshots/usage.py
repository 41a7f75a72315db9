"""What snapshots need of their packs, item by item, and which packs are mostly dead weight.

Reads manifests, and every directory of their workspaces once: contents are named by what they are, so one that was
walked for one snapshot needs no second look for another.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torpor.snapshots.backend import Backend, Entry
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.manifest import Manifest, PagedFile, SnapshotRef, decode_extents, load_manifest
from torpor.snapshots.objects import load_content
from torpor.snapshots.pack import PackIndex, PackRef, damaged, read_object, read_pack_index
from torpor.snapshots.pages import count_pages
from torpor.snapshots.tree import DIRECTORY, FILE, decode_directory

NEEDED_SHARE_MAX = 1 / 3
"""A pack is mostly dead when no more than this share of it is needed."""
DEAD_BYTES_MIN = 64 * 1024
"""Below this a pack is not worth a new manifest for each snapshot that names it."""

_FRAMES_CACHED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadWeight:
    """A pack that should be written anew; `stored_bytes` of it would go, as far as can be told."""

    ref: PackRef
    holds_pages: bool
    stored_bytes: int


class AllObjects:
    """Objects of every pack that it was shown, by their ids."""

    def __init__(self, backend: Backend, ids: ContentIds) -> None:
        self._backend = backend
        self._ids = ids
        self._places: dict[bytes, tuple[PackIndex, int]] = {}
        self._frames: OrderedDict[tuple[bytes, int], dict[bytes, bytes]] = OrderedDict()
        self.packs: dict[bytes, PackIndex] = {}

    def add(self, ref: PackRef) -> None:
        """Raises Damaged: snapshot_object_missing or snapshot_damaged."""
        if ref.name not in self.packs:
            pack = self.packs[ref.name] = read_pack_index(self._backend, ref)
            for item in range(pack.items):
                self._places[pack.ids_of(item, 1)] = pack, item

    def get(self, digest: bytes) -> bytes:
        if digest not in self._places:
            raise damaged(f"object {digest.hex()}", "no pack holds it")
        pack, item = self._places[digest]
        key = pack.ref.name, pack.frame_of(item)
        if key not in self._frames:
            frame = pack.frames[key[1]]
            stored = read_object(self._backend, pack.ref.key, frame.offset, frame.stored_bytes)
            self._frames[key] = dict(pack.split(frame, pack.open_frame(frame, stored)))
            if len(self._frames) > _FRAMES_CACHED:
                self._frames.popitem(last=False)
        return self._frames[key][digest]

    def ahead(self, digests: Iterable[bytes]) -> None:
        """Each directory is read once, and next to nothing else is."""

    def digest_of(self, data: bytes) -> bytes:
        return self._ids.of_object(data)


class Usage:
    """What the snapshots need that were added."""

    def __init__(self, backend: Backend, ids: ContentIds) -> None:
        self._backend = backend
        self.objects = AllObjects(backend, ids)
        self.pages: dict[bytes, bytearray] = {}
        """By a page pack's name: a byte for each page, 1 if it is needed."""
        self.fixed: set[bytes] = set()
        """Names of page packs that stay as they are: they hold deltas, or what deltas are compressed against."""
        self.needed: set[bytes] = set()
        """Ids of objects."""
        self._page_packs: dict[bytes, PackRef] = {}
        self._object_packs: dict[bytes, PackRef] = {}

    def add(self, ref: SnapshotRef) -> Manifest:
        """Raises Damaged; what was already counted of that snapshot stays so."""
        manifest = load_manifest(self._backend, ref)
        for pack in manifest.object_packs:
            self.objects.add(pack)
            self._object_packs[pack.name] = pack
        for pack in manifest.page_packs:
            if pack.name not in self.pages:
                self.pages[pack.name] = bytearray(count_pages(pack))
                self._page_packs[pack.name] = pack
        for pack, needs in zip(manifest.page_packs, manifest.needs, strict=False):
            if needs:
                self.fixed.update([pack.name, *(manifest.page_packs[number].name for number in needs)])
        for file in manifest.files:
            if isinstance(file, PagedFile):
                self._add_pages(manifest, file)
            else:
                self.needed.update(load_content(file.content, file.size, self.objects).objects)
        self._walk(manifest.tree_root)
        return manifest

    def dead_weight(self, entries: Mapping[str, Entry]) -> list[DeadWeight]:
        """Packs among `entries` (by key) that are mostly dead, the heaviest first."""
        found: list[DeadWeight] = []
        for ref in (*self._page_packs.values(), *self._object_packs.values()):
            entry = entries.get(ref.key)
            if entry is None or ref.name in self.fixed:
                continue
            holds_pages = ref.name in self._page_packs
            share = self._page_share(ref) if holds_pages else self._object_share(ref)
            dead_bytes = round(entry.stored_bytes * (1 - share))
            if share <= NEEDED_SHARE_MAX and dead_bytes >= DEAD_BYTES_MIN:
                found.append(DeadWeight(ref=ref, holds_pages=holds_pages, stored_bytes=dead_bytes))
        return sorted(found, key=lambda weight: weight.stored_bytes, reverse=True)

    def _page_share(self, ref: PackRef) -> float:
        needed = self.pages[ref.name]
        return needed.count(1) / max(1, len(needed))

    def _object_share(self, ref: PackRef) -> float:
        lengths = list(self.objects.packs[ref.name].objects())
        needed = sum(length for digest, length in lengths if digest in self.needed)
        return needed / max(1, sum(length for _, length in lengths))

    def _add_pages(self, manifest: Manifest, file: PagedFile) -> None:
        needed = [self.pages[pack.name] for pack in manifest.page_packs]
        for count, pack, first in decode_extents(file.extents):
            needed[pack][first : first + count] = b"\1" * count

    def _walk(self, directory: bytes) -> None:
        """Everything below a directory; below one that is known, everything is."""
        waiting = [directory]
        while waiting:
            digest = waiting.pop()
            if digest in self.needed:
                continue
            entries = decode_directory(self.objects.get(digest))
            for entry in entries:
                if entry.kind == DIRECTORY:
                    waiting.append(entry.digest)
                elif entry.kind == FILE:
                    self.needed.update(load_content(entry.content, entry.size, self.objects).objects)
            self.needed.add(digest)
