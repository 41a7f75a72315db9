"""Writes what is still needed of some packs into new ones, and the manifests that named them under new ids.

Nothing that is there is changed: until a row names a new snapshot, the old one is the session's. Items are verified as
they are read, and each new pack is read back before it is stored. Order and crash points are in docs/collecting.md.
"""

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TypeAlias

from torpor.core.crash import crash_point
from torpor.core.errors import Conflict, MachineUnfit
from torpor.core.ids import SnapshotId
from torpor.snapshots.backend import Backend
from torpor.snapshots.collect import Progress
from torpor.snapshots.content_ids import PAGE_BYTES, ContentIds
from torpor.snapshots.garbage import Listing
from torpor.snapshots.layout import Layout, Room, is_scattered
from torpor.snapshots.lease import Lease
from torpor.snapshots.manifest import (
    Manifest,
    PagedFile,
    SnapshotRef,
    WholeFile,
    decode_extents,
    encode_extents,
    encode_manifest,
    load_manifest,
    manifest_key,
)
from torpor.snapshots.objects import ObjectWriter
from torpor.snapshots.pack import PackRef, read_object, read_pack_index
from torpor.snapshots.page_packs import PagePacks
from torpor.snapshots.pages import extents_of
from torpor.snapshots.usage import DeadWeight, Usage

_Files: TypeAlias = "tuple[tuple[PagedFile | WholeFile, ...], tuple[PackRef, ...], tuple[tuple[int, ...], ...]]"
"""An image's files, the packs that it needs, and which of them need which for their deltas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repacked:
    """A snapshot, and another one with the same contents."""

    old: SnapshotRef
    new: SnapshotRef


class Repacker:
    """One run: `look` at every snapshot, then `write` what is needed of mostly dead packs anew."""

    def __init__(
        self, backend: Backend, ids: ContentIds, *, grace_seconds: float, progress: Progress, room: Room
    ) -> None:
        """Args:
        grace_seconds: younger packs, and snapshots, are left alone.
        room: where an image is restored to that is laid out anew.
        """
        self._room = room
        self._backend = backend
        self._usage = Usage(backend, ids)
        self._ids = ids
        self._grace_seconds = grace_seconds
        self._progress = progress
        self._pages = _PageMover(backend, ids)
        self._touched: list[SnapshotRef] = []
        self._objects: dict[bytes, list[PackRef]] = {}
        """New packs that together hold what was needed of an emptied one, by its name."""
        self._emptied: set[bytes] = set()
        self.weights: list[DeadWeight] = []
        self.scattered: set[SnapshotId] = set()
        """Snapshots whose image is to be laid side by side."""
        self.stored_bytes = 0

    def look(
        self, refs: Sequence[SnapshotRef], in_use: Collection[SnapshotId] = (), newest: Collection[SnapshotId] = ()
    ) -> None:
        """Find the packs to be emptied, `weights`. It has to be every snapshot: what none of them needs is dropped.

        Args:
            in_use: snapshots of which no pack is touched.
            newest: those that a restore would take: images that are to lie side by side.

        Raises:
            Damaged: a snapshot can't be read, so nobody knows what it needs.
        """
        kept: set[bytes] = set()
        names: dict[SnapshotId, frozenset[bytes]] = {}
        known: dict[bytes, bytes] = {}
        now_ns = self._backend.now_ns()
        listing = Listing.of([*self._backend.entries("packs/"), *self._backend.entries("manifests/")], now_ns)
        idle = listing.older(listing.manifests, self._grace_seconds)
        for done, ref in enumerate(refs, 1):
            manifest = self._usage.add(ref)
            named = frozenset(known.setdefault(pack.name, pack.name) for pack in manifest.packs)
            if ref.id in in_use:
                kept |= named
            else:
                names[ref.id] = named
                if ref.id in newest and manifest_key(ref.id) in idle and is_scattered(manifest):
                    self.scattered.add(ref.id)
            self._progress("looking for dead weight", done, len(refs))
        heavy = self._usage.dead_weight(listing.older(listing.packs, self._grace_seconds))
        self.weights = [weight for weight in heavy if weight.ref.name not in kept]
        emptied = self._emptied = {weight.ref.name for weight in self.weights}
        self._touched = [ref for ref in refs if ref.id in self.scattered or emptied & names.get(ref.id, frozenset())]

    def write(self, new_id: Callable[[], SnapshotId], lease: Lease) -> list[Repacked]:
        """Empty the packs that were found into new ones, and give each snapshot that names one a new manifest.

        Raises:
            Damaged: something that is needed is not what was saved.
            MachineUnfit: no_space, storage_failed.
            Conflict: lease_lost.
        """
        for done, weight in enumerate(self.weights, 1):
            if weight.holds_pages:
                self._pages.move(weight.ref, self._usage.pages[weight.ref.name])
            else:
                self._move_objects(weight.ref)
            self._progress("repacking", done, len(self.weights))
        self._pages.finish()
        self.stored_bytes += self._pages.stored_bytes
        made: list[Repacked] = []
        for done, ref in enumerate(self._touched, 1):
            manifest = load_manifest(self._backend, ref)
            laid_out = self._lay_out(manifest)
            if laid_out is not None or any(pack.name in self._emptied for pack in manifest.packs):
                made.append(self._rewrite(ref, manifest, laid_out or self._move_files(manifest), new_id(), lease))
            self._progress("rewriting manifests", done, len(self._touched))
        return made

    def _rewrite(
        self, ref: SnapshotRef, manifest: Manifest, laid_out: "_Files", snapshot_id: SnapshotId, lease: Lease
    ) -> Repacked:
        files, page_packs, needs = laid_out
        data = encode_manifest(
            replace(
                manifest,
                snapshot_id=snapshot_id,
                files=files,
                page_packs=page_packs,
                needs=needs,
                debt=manifest.debt if any(needs) else 0,
                object_packs=tuple(self._renamed(manifest.object_packs)),
            ),
            ref.key,
        )
        lease.check()
        if not self._backend.put(manifest_key(snapshot_id), data):
            raise Conflict("snapshot_exists", f"cannot save snapshot {snapshot_id}: it exists")
        self.stored_bytes += len(data)
        crash_point("repack.stored")
        new = SnapshotRef(id=snapshot_id, manifest_digest=sha256(data).hexdigest(), key=ref.key)
        return Repacked(old=ref, new=new)

    def _lay_out(self, manifest: Manifest) -> "_Files | None":
        """The files of a scattered image side by side; None if it is none, or there is no room to restore it."""
        if manifest.snapshot_id not in self.scattered:
            return None
        layout = Layout(self._backend, self._ids, self._room)
        try:
            files = layout.place(manifest)
        except MachineUnfit as error:
            if error.code != "no_staging_space":
                raise
            self.scattered.discard(manifest.snapshot_id)
            return None
        packs = tuple(layout.finish())
        self.stored_bytes += layout.stored_bytes
        return files, packs, ((),) * len(packs)

    def _move_objects(self, ref: PackRef) -> None:
        writer = ObjectWriter(self._backend, self._ids, {})
        pack = self._usage.objects.packs[ref.name]
        for frame in pack.frames:
            wanted = [pack.ids_of(item, 1) for item in range(frame.first_item, frame.first_item + frame.items)]
            if any(digest in self._usage.needed for digest in wanted):
                stored = read_object(self._backend, ref.key, frame.offset, frame.stored_bytes)
                for digest, data in pack.split(frame, pack.open_frame(frame, stored)):
                    if digest in self._usage.needed:
                        writer.put(data)
        writer.finish()
        self._objects[ref.name] = [written.ref for written in writer.packs]
        self.stored_bytes += writer.stored_bytes

    def _renamed(self, refs: Iterable[PackRef]) -> Iterator[PackRef]:
        for ref in refs:
            yield from self._objects.get(ref.name, [ref])

    def _move_files(self, manifest: Manifest) -> "_Files":
        """The image's files with the extents that they have now, and the packs that these name."""
        packs: dict[PackRef, int] = {}
        files = tuple(
            PagedFile(file.name, file.size, file.page_list, self._move_extents(manifest, file, packs))
            if isinstance(file, PagedFile)
            else file
            for file in manifest.files
        )
        needs: dict[int, tuple[int, ...]] = {}
        for old, needed in zip(manifest.page_packs, manifest.needs, strict=False):
            if needed and old in packs:  # Neither it nor what it needs was moved.
                needs[packs[old]] = tuple(packs.setdefault(manifest.page_packs[at], len(packs)) for at in needed)
        return files, tuple(packs), tuple(needs.get(number, ()) for number in range(len(packs)))

    def _move_extents(self, manifest: Manifest, file: PagedFile, packs: dict[PackRef, int]) -> bytes:
        places = array("Q")
        for extent in decode_extents(file.extents):
            old = manifest.page_packs[extent.pack]
            moved = self._pages.places.get(old.name)
            if moved is None:
                first = packs.setdefault(old, len(packs)) << 32 | extent.first
                places.extend(range(first, first + extent.count))
            else:
                for item in range(extent.first, extent.first + extent.count):
                    number, place = moved[item]
                    places.append(packs.setdefault(self._pages.packs[number], len(packs)) << 32 | place)
        return encode_extents(extents_of(places))


class _PageMover:
    """Collects pages of several packs into full new ones."""

    def __init__(self, backend: Backend, ids: ContentIds) -> None:
        self._backend = backend
        self._packs = PagePacks(backend, ids)
        self.places: dict[bytes, dict[int, tuple[int, int]]] = {}
        """By an emptied pack's name and item: which new pack, and which item of it."""

    @property
    def packs(self) -> list[PackRef]:
        return self._packs.packs

    @property
    def stored_bytes(self) -> int:
        return self._packs.stored_bytes

    def move(self, ref: PackRef, needed: bytes | bytearray) -> None:
        """`needed` has a byte for each page, 1 if it is."""
        pack = read_pack_index(self._backend, ref)
        places = self.places[ref.name] = {}
        for frame in pack.frames:
            wanted = needed[frame.first_item : frame.first_item + frame.items]
            if not any(wanted):
                continue
            raw = pack.open_frame(frame, read_object(self._backend, ref.key, frame.offset, frame.stored_bytes))
            for at in range(frame.items):
                if wanted[at]:
                    item = frame.first_item + at
                    page = raw[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]
                    places[item] = self._packs.add(page, pack.ids_of(item, 1))

    def finish(self) -> None:
        self._packs.finish()
