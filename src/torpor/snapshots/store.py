"""The snapshot store: saves an image and a workspace as one snapshot, and gives back exactly what was saved.

Synchronous: callers run it on worker threads. Thread-safe. It knows bytes, never sessions, and no key but those that
come with each snapshot. Nothing it wrote is ever changed; the order of a save, and what a crash leaves, are in
docs/snapshot-format.md.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from torpor.core.clock import Clock, SystemClock
from torpor.core.crash import crash_point
from torpor.core.errors import Conflict, Damaged, InvalidInput
from torpor.core.ids import SnapshotId
from torpor.snapshots.backend import Backend, storage_errors
from torpor.snapshots.bases import Bases
from torpor.snapshots.capture import TreeCapture, store_file_at, store_tree
from torpor.snapshots.cipher import Key
from torpor.snapshots.condemned import is_condemned, read_condemned
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.diff import Change, diff_directory, diff_trees
from torpor.snapshots.fold import fold_packs
from torpor.snapshots.image import PageWriter, page_index, restore_paged, restore_whole
from torpor.snapshots.index_cache import IndexCache, Indexes
from torpor.snapshots.lease import Lease
from torpor.snapshots.manifest import (
    Manifest,
    PagedFile,
    SnapshotRef,
    WholeFile,
    encode_manifest,
    load_head,
    load_manifest,
    manifest_key,
)
from torpor.snapshots.materialize import ExportReport, export, materialize
from torpor.snapshots.objects import Content, ObjectReader, ObjectWriter, places_of_objects
from torpor.snapshots.owners import Signature
from torpor.snapshots.pack import PackIndex, missing, read_pack_index, read_pack_indexes
from torpor.snapshots.pages import EMPTY_INDEX, PageIndex
from torpor.snapshots.shared import NOTHING_SHARED, Shared, SharedIndexes
from torpor.snapshots.tree import DirNode, TreeIndex, objects_below
from torpor.snapshots.verify import Verifier

PAGED_FILES = frozenset({"pages.img"})
# A pack that another session made is not kept alive, and readable, for less than this.
_SHARED_BYTES_MIN = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSnapshot:
    """What a save did.

    Attributes:
        ref: keep its digest with the id, a restore asks for both.
        raw_bytes: what a restore would write.
        stored_bytes: what this save added to the store.
        tree: what the workspace's next capture starts from.
        parent_problem: why nothing was shared with the parent; empty when all is well.
    """

    ref: SnapshotRef
    raw_bytes: int
    stored_bytes: int
    new_pages: int
    total_pages: int
    tree: TreeIndex = field(repr=False)
    seconds: float
    parent_problem: str

    @property
    def id(self) -> SnapshotId:
        return self.ref.id

    @property
    def manifest_digest(self) -> str:
        return self.ref.manifest_digest

    @property
    def tree_root(self) -> str:
        return self.tree.root.digest.hex()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """What a save has put into packs, for its manifest."""

    indexes: Indexes
    files: tuple[PagedFile | WholeFile, ...]
    tree: DirNode
    stored_bytes: int
    new_pages: int
    total_pages: int
    problem: str


_NO_INDEXES = Indexes(pages=EMPTY_INDEX, object_packs=())


class SnapshotStore:
    def __init__(
        self,
        backend: Backend,
        ids: ContentIds,
        *,
        signature: Signature | None = None,
        shared: SharedIndexes | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Args:
        ids: names contents; those that go by other ids share nothing.
        signature: whose snapshots it saves; None, of nobody: nothing in it is ever collected.
        shared: what snapshots without a parent are compared with.
        """
        self._backend = backend
        self._ids = ids
        self._signature = signature
        self._shared = shared
        self._clock = clock or SystemClock()
        self._bases = Bases(backend)
        self._cache = IndexCache()

    def save(
        self,
        *,
        image_dir: Path,
        workspace: TreeCapture,
        parent: SnapshotRef | None,
        pins: Mapping[str, str],
        snapshot_id: SnapshotId,
        key: Key,
        lease: Lease,
        shares: Sequence[str] = (),
        compared_with: SnapshotRef | None = None,
        paged_files: AbstractSet[str] = PAGED_FILES,
    ) -> SavedSnapshot:
        """Store an image (a flat directory of files) and a workspace; durable on return.

        Args:
            parent: what to deduplicate against. If it is missing or damaged everything is stored, and the
                result says so.
            key: what opens the snapshot from now on.
            lease: hold it until the snapshot's row is committed.
            shares: names of shared indexes; the first that there is takes the place of pages that the parent has not.
            compared_with: what the workspace was compared with, if that is not the parent, which may be newer.
            paged_files: names of the memory images; the others are small and stored whole.

        Raises:
            MachineUnfit: no_space, storage_failed. The snapshot does not exist, earlier ones are untouched.
            Damaged: the capture shares files with a parent that can't be read: capture without `previous`; or
                `snapshot_condemned`, with one of which a collection may take the packs: try again when it has ended.
            Conflict: snapshot_exists, lease_lost.
        """
        started = self._clock.monotonic()
        if self._signature is not None:
            self._signature.make()
        condemned = read_condemned(self._backend)
        before, problem = self._indexes_before(parent, compared_with, condemned, workspace, snapshot_id)
        written = self._write_packs(image_dir, paged_files, workspace, before, shares, condemned)
        crash_point("snapshot.packs_durable")
        manifest = Manifest(
            snapshot_id=snapshot_id,
            parent=parent and parent.id,
            pins=dict(pins),
            page_packs=written.indexes.pages.packs,
            object_packs=tuple(pack.ref for pack in written.indexes.object_packs),
            files=written.files,
            tree_root=written.tree.digest,
            tree_bytes=written.tree.file_bytes,
            needs=written.indexes.pages.needs,
            debt=written.indexes.pages.debt,
        )
        lease.check()
        data = self._publish(manifest, key)
        ref = SnapshotRef(id=snapshot_id, manifest_digest=sha256(data).hexdigest(), key=key)
        self._cache.remember(ref, written.indexes, manifest.parent)
        return SavedSnapshot(
            ref=ref,
            raw_bytes=manifest.raw_bytes,
            stored_bytes=written.stored_bytes + len(data),
            new_pages=written.new_pages,
            total_pages=written.total_pages,
            tree=workspace.index(written.tree, snapshot_id),
            seconds=self._clock.monotonic() - started,
            parent_problem=problem or written.problem,
        )

    def reseal(
        self,
        ref: SnapshotRef,
        others: Sequence[tuple[SnapshotId, Key]],
        *,
        lease: Lease,
        each: Callable[[int], None] = lambda _: None,
    ) -> list[SnapshotRef]:
        """Make other snapshots of the same packs, each of which opens with a key of its own; durable on return.

        Args:
            others: their ids and keys.
            each: told how many are there by now.
            lease: held from before the row was read that names `ref`, and until those of the others are committed.

        Raises:
            Damaged: as `read_manifest`.
            MachineUnfit: no_space, storage_failed.
            Conflict: snapshot_exists, lease_lost.
        """
        manifest = replace(self.read_manifest(ref), parent=ref.id)
        made: list[SnapshotRef] = []
        for snapshot_id, key in others:
            lease.check()
            data = self._publish(replace(manifest, snapshot_id=snapshot_id), key)
            made.append(SnapshotRef(id=snapshot_id, manifest_digest=sha256(data).hexdigest(), key=key))
            each(len(made))
        return made

    def share(self, ref: SnapshotRef, names: Sequence[str], origin: str) -> None:
        """Let first snapshots that share one of these names be compared with this one, where there is none yet.

        Raises:
            Damaged: as `read_manifest`.
            MachineUnfit: no_space, storage_failed.
        """
        free = [name for name in names if not self._is_shared(name)]
        if self._shared is None or not free:
            return
        indexes = self._cache.recall(ref) or self._load_indexes(ref)
        shared = Shared(pages=indexes.pages, object_packs=tuple(pack.ref for pack in indexes.object_packs))
        for name in free:
            self._shared.write(name, origin, shared)

    def _is_shared(self, name: str) -> bool:
        """By a snapshot whose packs are still there."""
        found = self._shared.find([name]) if self._shared else NOTHING_SHARED
        return found is not NOTHING_SHARED and not self._backend.absent(ref.key for ref in found.pages.packs)

    def lease(self) -> Lease:
        """Whoever reads a snapshot holds one from before it reads the row that names it, whoever saves one from
        before the save until the commit: nothing that either may need is collected meanwhile.
        """
        with storage_errors("take a lease on the snapshot store"):
            return self._backend.leases.hold()

    def read_manifest(self, ref: SnapshotRef) -> Manifest:
        """Raises Damaged: snapshot_object_missing, snapshot_damaged, snapshot_version_unknown, snapshot_key_wrong."""
        return load_manifest(self._backend, ref)

    def pack_names(self, snapshot_id: SnapshotId, manifest_digest: str | None) -> tuple[str, ...]:
        """The packs that a snapshot needs, as the backend calls them; takes no key.

        Raises:
            Damaged: snapshot_object_missing, snapshot_damaged, snapshot_version_unknown.
        """
        return load_head(self._backend, snapshot_id, manifest_digest).pack_names

    def restore_image(self, ref: SnapshotRef, destination: Path) -> None:
        """Write the image's files into `destination`, a directory that is empty or does not exist.

        Every byte is verified. After an error, or a crash, the directory is half filled and the caller's to
        remove.

        Raises:
            Damaged: as `read_manifest`; the message names the object.
            InvalidInput: directory_not_empty.
            MachineUnfit: no_space, storage_failed.
        """
        manifest = self.read_manifest(ref)
        with storage_errors(f"restore image to {destination}"):
            destination.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(destination.iterdir()):
                raise InvalidInput("directory_not_empty", f"cannot restore image to {destination}: it is not empty")
        packs = read_pack_indexes(manifest.page_packs, self._backend)
        objects = self._objects(ref, manifest)
        for file in manifest.files:
            if isinstance(file, PagedFile):
                restore_paged(file, packs, self._backend, destination)
            else:
                restore_whole(file, objects, destination)

    def restore_workspace(self, ref: SnapshotRef, destination: Path) -> TreeIndex:
        """Write the workspace into `destination`, an empty directory; the result spares the next capture from
        reading it.

        Raises:
            As `restore_image`.
        """
        manifest = self.read_manifest(ref)
        objects = self._objects(ref, manifest)
        with objects.reading_ahead():
            return materialize(manifest.tree_root, destination, objects, snapshot_id=ref.id, clock=self._clock)

    def export_workspace(self, ref: SnapshotRef, destination: Path) -> ExportReport:
        """Lay the workspace over an existing directory; see `materialize.export`."""
        manifest = self.read_manifest(ref)
        objects = self._objects(ref, manifest)
        with objects.reading_ahead():
            return export(manifest.tree_root, destination, objects)

    def diff(self, before: SnapshotRef, after: SnapshotRef) -> list[Change]:
        """What changed in the workspace between two snapshots."""
        one, other = self.read_manifest(before), self.read_manifest(after)
        return diff_trees(one.tree_root, other.tree_root, self._objects(before, one), self._objects(after, other))

    def diff_directory(self, ref: SnapshotRef, directory: Path) -> list[Change]:
        """What changed from a snapshot's workspace to what a directory holds now."""
        manifest = self.read_manifest(ref)
        return diff_directory(manifest.tree_root, directory, self._objects(ref, manifest))

    def verify(self, ref: SnapshotRef) -> list[str]:
        """Read everything that the snapshot needs; one sentence for each problem, naming the object."""
        return self.verifier(read_data=True).problems_of(ref)

    def verifier(self, *, read_data: bool) -> Verifier:
        """What looks at many snapshots, each of their packs once."""
        return Verifier(self._backend, self._ids, read_data=read_data)

    def _indexes_before(
        self,
        parent: SnapshotRef | None,
        compared_with: SnapshotRef | None,
        condemned: AbstractSet[str],
        workspace: TreeCapture,
        snapshot_id: SnapshotId,
    ) -> tuple[Indexes, str]:
        """The parent's; and what a capture left out as unchanged is where it was compared with."""
        based_on = workspace.based_on.snapshot_id if workspace.based_on is not None else None
        of_parent = parent is not None and based_on == parent.id
        before, problem = self._indexes_of_parent(parent, condemned, must_have=of_parent)
        if based_on is None or of_parent:
            return before, problem
        if compared_with is None or compared_with.id != based_on:
            raise InvalidInput(
                "capture_of_other_parent",
                f"cannot save snapshot {snapshot_id}: its workspace was compared with {based_on}, not with those",
            )
        compared, _ = self._indexes_of_parent(compared_with, condemned, must_have=True)
        packs = {pack.ref.key: pack for pack in (*compared.object_packs, *before.object_packs)}
        return replace(before, object_packs=tuple(packs.values())), problem

    def _indexes_of_parent(
        self, parent: SnapshotRef | None, condemned: AbstractSet[str], *, must_have: bool
    ) -> tuple[Indexes, str]:
        if parent is None:
            return _NO_INDEXES, ""
        try:
            indexes = self._cache.recall(parent) or self._load_indexes(parent)
            packs = [pack.ref.key for pack in indexes.object_packs]
            for key in self._backend.absent(packs):
                raise missing(key)
            for key in condemned & set(packs):
                raise is_condemned(key)
        except Damaged as error:
            self._cache.forget(parent)
            if must_have:
                raise
            return _NO_INDEXES, str(error)
        return indexes, ""

    def _write_packs(
        self,
        image_dir: Path,
        paged_files: AbstractSet[str],
        workspace: TreeCapture,
        before: Indexes,
        shares: Sequence[str],
        condemned: AbstractSet[str],
    ) -> _Written:
        known, shared_packs = self._known(before, shares, condemned)
        absent = condemned | self._backend.absent(ref.key for ref in known.packs)
        present = [ref.key not in absent for ref in known.packs]
        stored = places_of_objects((*before.object_packs, *shared_packs))
        pages = PageWriter(self._backend, self._ids, known, present, self._bases, is_first=known is not before.pages)
        objects = ObjectWriter(self._backend, self._ids, stored)
        whole = _store_files(image_dir, paged_files, pages, objects)
        tree = store_tree(workspace, objects)

        def needed() -> set[bytes]:
            return {*objects_below(tree)}.union(*(content.objects for content in whole.values()))

        if shared_packs:
            missing_here = needed() - places_of_objects(before.object_packs).keys()
            shared_packs = self._worth_sharing(shared_packs, missing_here, stored, objects)
        objects.finish()
        paged, index = pages.finish()
        object_packs, folded_bytes = fold_packs(
            self._backend, self._ids, (*before.object_packs, *shared_packs, *objects.packs), needed
        )
        return _Written(
            indexes=Indexes(pages=index, object_packs=object_packs),
            files=tuple(sorted([*paged, *whole], key=lambda file: file.name)),
            tree=tree,
            stored_bytes=pages.stored_bytes + objects.stored_bytes + folded_bytes,
            new_pages=pages.new_pages,
            total_pages=pages.total_pages,
            problem=pages.problem,
        )

    def _known(
        self, before: Indexes, shares: Sequence[str], condemned: AbstractSet[str]
    ) -> tuple[PageIndex, list[PackIndex]]:
        """The pages that a save may refer to, and shared object packs that can be read."""
        if before.pages.pages or self._shared is None:
            return before.pages, []
        shared, found = self._shared.find(shares), list[PackIndex]()
        for ref in shared.object_packs:
            if ref.key in condemned:
                continue
            with contextlib.suppress(Damaged):
                found.append(read_pack_index(self._backend, ref))
        return shared.pages, found

    def _worth_sharing(
        self, packs: Sequence[PackIndex], needed: AbstractSet[bytes], stored: dict[bytes, int], writer: ObjectWriter
    ) -> list[PackIndex]:
        """Those that hold so much of what is needed that it shall not be stored again; of the others, it is."""
        worth: list[PackIndex] = []
        for pack in packs:
            used = {digest: length for digest, length in pack.objects() if digest in needed}
            if sum(used.values()) >= _SHARED_BYTES_MIN:
                worth.append(pack)
                continue
            reader = ObjectReader(self._backend, self._ids, [pack])
            for digest in used:
                stored.pop(digest, None)
                writer.put(reader.get(digest))
        return worth

    def _load_indexes(self, ref: SnapshotRef) -> Indexes:
        manifest = self.read_manifest(ref)
        indexes = read_pack_indexes(manifest.packs, self._backend)
        pages = len(manifest.page_packs)
        paged = [file for file in manifest.files if isinstance(file, PagedFile)]
        return Indexes(
            pages=page_index(paged, indexes[:pages], manifest.debt),
            object_packs=tuple(indexes[pages:]),
        )

    def _publish(self, manifest: Manifest, key: Key) -> bytes:
        """Write the manifest last: from here on the snapshot restores."""
        data = encode_manifest(manifest, key)
        if not self._backend.put(manifest_key(manifest.snapshot_id), data):
            raise Conflict("snapshot_exists", f"cannot save snapshot {manifest.snapshot_id}: it exists")
        crash_point("snapshot.manifest_written")
        return data

    def _objects(self, ref: SnapshotRef, manifest: Manifest) -> ObjectReader:
        known = self._cache.recall(ref)
        packs = manifest.object_packs if known is None else known.object_packs
        return ObjectReader(self._backend, self._ids, packs)


def _store_files(
    image_dir: Path, paged_files: AbstractSet[str], pages: PageWriter, objects: ObjectWriter
) -> dict[WholeFile, Content]:
    whole: dict[WholeFile, Content] = {}
    with storage_errors(f"read image {image_dir}"):
        files = [(path, path.stat().st_size) for path in sorted(image_dir.iterdir())]
    for path, size in files:
        if path.name in paged_files:
            pages.store(path)
        else:
            content = store_file_at(path, size, objects)
            whole[WholeFile(path.name, size, content.encoded)] = content
    return whole
