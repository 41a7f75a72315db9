"""The snapshot store: saves an image and a workspace as one snapshot, and gives back exactly what was saved.

Synchronous: callers run it on worker threads. Thread-safe. It knows bytes, never sessions. Nothing it wrote
    is ever changed; the order of a save, and what a crash leaves, are in docs/snapshot-format.md.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from torpor.core.clock import Clock, SystemClock
from torpor.core.crash import crash_point
from torpor.core.errors import Conflict, Damaged, InvalidInput
from torpor.core.ids import SnapshotId
from torpor.snapshots.backend import Backend, storage_errors
from torpor.snapshots.capture import TreeCapture, store_file_at, store_tree
from torpor.snapshots.diff import Change, diff_directory, diff_trees
from torpor.snapshots.fold import fold_packs
from torpor.snapshots.image import PageWriter, page_index, restore_paged, restore_whole
from torpor.snapshots.manifest import (
    Manifest,
    PagedFile,
    WholeFile,
    encode_manifest,
    load_manifest,
    manifest_key,
)
from torpor.snapshots.materialize import ExportReport, export, materialize
from torpor.snapshots.objects import Content, ObjectReader, ObjectWriter, places_of_objects
from torpor.snapshots.pack import PackIndex, missing, read_pack_index
from torpor.snapshots.pages import EMPTY_INDEX, PageIndex
from torpor.snapshots.tree import TreeIndex, objects_below
from torpor.snapshots.verify import problems_of

PAGED_FILES = frozenset({"pages.img"})
_CACHED_ITEMS_MAX = 2_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSnapshot:
    """What a save did.

    Attributes:
        manifest_digest: hexadecimal; keep it with the id, a restore asks for it.
        raw_bytes: what a restore would write.
        stored_bytes: what this save added to the store.
        tree: what the workspace's next capture starts from.
        parent_problem: why nothing was shared with the parent; empty when all is well.
    """

    id: SnapshotId
    manifest_digest: str
    raw_bytes: int
    stored_bytes: int
    new_pages: int
    total_pages: int
    tree: TreeIndex = field(repr=False)
    seconds: float
    parent_problem: str

    @property
    def tree_root(self) -> str:
        return self.tree.root.digest.hex()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Indexes:
    """What a save needs to know of its parent."""

    pages: PageIndex
    object_packs: tuple[PackIndex, ...]

    @property
    def items(self) -> int:
        return self.pages.pages + sum(pack.items for pack in self.object_packs)


_NO_INDEXES = _Indexes(pages=EMPTY_INDEX, object_packs=())


class SnapshotStore:
    def __init__(self, backend: Backend, *, clock: Clock | None = None) -> None:
        self._backend = backend
        self._clock = clock or SystemClock()
        self._cache: OrderedDict[SnapshotId, _Indexes] = OrderedDict()
        self._lock = threading.Lock()

    def save(
        self,
        *,
        image_dir: Path,
        workspace: TreeCapture,
        parent: SnapshotId | None,
        pins: Mapping[str, str],
        snapshot_id: SnapshotId,
        paged_files: AbstractSet[str] = PAGED_FILES,
    ) -> SavedSnapshot:
        """Store an image (a flat directory of files) and a workspace; durable on return.

        Args:
            parent: what to deduplicate against. If it is missing or damaged everything is stored, and the
                result says so. paged_files: names of the memory images; the others are small and stored
                whole.

        Raises:
            MachineUnfit: no_space, storage_failed. The snapshot does not exist, earlier ones are untouched.
            Damaged: the capture shares files with a parent that can't be read: capture without `previous`.
            Conflict: snapshot_exists.
        """
        started = self._clock.monotonic()
        _check_parent(workspace, parent, snapshot_id)
        before, problem = self._indexes_of_parent(parent, must_have=workspace.based_on is not None)
        present = [self._backend.exists(ref.key) for ref in before.pages.packs]
        pages = PageWriter(self._backend, before.pages, present)
        objects = ObjectWriter(self._backend, places_of_objects(before.object_packs))
        whole = _store_files(image_dir, paged_files, pages, objects)
        tree = store_tree(workspace, objects)
        objects.finish()
        paged, index = pages.finish()
        object_packs, folded_bytes = fold_packs(
            self._backend,
            (*before.object_packs, *objects.packs),
            lambda: {*objects_below(tree)}.union(*(content.objects for content in whole.values())),
        )
        crash_point("snapshot.packs_durable")
        manifest = Manifest(
            snapshot_id=snapshot_id,
            parent=parent,
            pins=dict(pins),
            page_packs=index.packs,
            object_packs=tuple(pack.ref for pack in object_packs),
            files=tuple(sorted([*paged, *whole], key=lambda file: file.name)),
            tree_root=tree.digest,
            tree_bytes=tree.file_bytes,
        )
        data = self._publish(manifest)
        self._remember(snapshot_id, _Indexes(pages=index, object_packs=object_packs))
        return SavedSnapshot(
            id=snapshot_id,
            manifest_digest=sha256(data).hexdigest(),
            raw_bytes=manifest.raw_bytes,
            stored_bytes=pages.stored_bytes + objects.stored_bytes + folded_bytes + len(data),
            new_pages=pages.new_pages,
            total_pages=pages.total_pages,
            tree=workspace.index(tree, snapshot_id),
            seconds=self._clock.monotonic() - started,
            parent_problem=problem,
        )

    def read_manifest(self, snapshot_id: SnapshotId, manifest_digest: str) -> Manifest:
        """Raises Damaged: snapshot_object_missing, snapshot_damaged."""
        return load_manifest(self._backend, snapshot_id, bytes.fromhex(manifest_digest))

    def restore_image(self, snapshot_id: SnapshotId, manifest_digest: str, destination: Path) -> None:
        """Write the image's files into `destination`, a directory that is empty or does not exist.

        Every byte is verified. After an error, or a crash, the directory is half filled and the caller's to
        remove.

        Raises:
            Damaged: snapshot_object_missing, snapshot_damaged; the message names the object.
            InvalidInput: directory_not_empty.
            MachineUnfit: no_space, storage_failed.
        """
        manifest = self.read_manifest(snapshot_id, manifest_digest)
        with storage_errors(f"restore image to {destination}"):
            destination.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(destination.iterdir()):
                raise InvalidInput("directory_not_empty", f"cannot restore image to {destination}: it is not empty")
        packs = [read_pack_index(self._backend, ref) for ref in manifest.page_packs]
        objects = self._objects(manifest)
        for file in manifest.files:
            if isinstance(file, PagedFile):
                restore_paged(file, packs, self._backend, destination)
            else:
                restore_whole(file, objects, destination)

    def restore_workspace(self, snapshot_id: SnapshotId, manifest_digest: str, destination: Path) -> TreeIndex:
        """Write the workspace into `destination`, an empty directory; the result spares the next capture from
        reading it.

        Raises:
            As `restore_image`.
        """
        manifest = self.read_manifest(snapshot_id, manifest_digest)
        objects = self._objects(manifest)
        return materialize(manifest.tree_root, destination, objects, snapshot_id=snapshot_id, clock=self._clock)

    def export_workspace(self, snapshot_id: SnapshotId, manifest_digest: str, destination: Path) -> ExportReport:
        """Lay the workspace over an existing directory; see `materialize.export`."""
        manifest = self.read_manifest(snapshot_id, manifest_digest)
        return export(manifest.tree_root, destination, self._objects(manifest))

    def diff(self, before: tuple[SnapshotId, str], after: tuple[SnapshotId, str]) -> list[Change]:
        """What changed in the workspace between two snapshots, each given by id and manifest digest."""
        one, other = self.read_manifest(*before), self.read_manifest(*after)
        return diff_trees(one.tree_root, other.tree_root, self._objects(one), self._objects(other))

    def diff_directory(self, snapshot_id: SnapshotId, manifest_digest: str, directory: Path) -> list[Change]:
        """What changed from a snapshot's workspace to what a directory holds now."""
        manifest = self.read_manifest(snapshot_id, manifest_digest)
        return diff_directory(manifest.tree_root, directory, self._objects(manifest))

    def verify(self, snapshot_id: SnapshotId, manifest_digest: str) -> list[str]:
        """Read everything that the snapshot needs; one sentence for each problem, naming the object."""
        try:
            manifest = self.read_manifest(snapshot_id, manifest_digest)
        except Damaged as error:
            return [str(error)]
        return problems_of(manifest, self._backend)

    def _indexes_of_parent(self, parent: SnapshotId | None, *, must_have: bool) -> tuple[_Indexes, str]:
        if parent is None:
            return _NO_INDEXES, ""
        try:
            indexes = self._recall(parent) or self._load_indexes(parent)
            for pack in indexes.object_packs:
                if not self._backend.exists(pack.ref.key):
                    raise missing(pack.ref.key)
        except Damaged as error:
            self._forget(parent)
            if must_have:
                raise
            return _NO_INDEXES, str(error)
        return indexes, ""

    def _load_indexes(self, snapshot_id: SnapshotId) -> _Indexes:
        manifest = load_manifest(self._backend, snapshot_id, None)
        page_packs = [read_pack_index(self._backend, ref) for ref in manifest.page_packs]
        paged = [file for file in manifest.files if isinstance(file, PagedFile)]
        return _Indexes(
            pages=page_index(paged, page_packs),
            object_packs=tuple(read_pack_index(self._backend, ref) for ref in manifest.object_packs),
        )

    def _publish(self, manifest: Manifest) -> bytes:
        """Write the manifest last: from here on the snapshot restores."""
        data = encode_manifest(manifest)
        if not self._backend.put(manifest_key(manifest.snapshot_id), data):
            raise Conflict("snapshot_exists", f"cannot save snapshot {manifest.snapshot_id}: it exists")
        crash_point("snapshot.manifest_written")
        return data

    def _objects(self, manifest: Manifest) -> ObjectReader:
        return ObjectReader(self._backend, [read_pack_index(self._backend, ref) for ref in manifest.object_packs])

    def _recall(self, snapshot_id: SnapshotId) -> _Indexes | None:
        with self._lock:
            return self._cache.get(snapshot_id)

    def _remember(self, snapshot_id: SnapshotId, indexes: _Indexes) -> None:
        """Keep the newest indexes, up to a total number of items (24 bytes a page, about 40 an object)."""
        with self._lock:
            self._cache[snapshot_id] = indexes
            while len(self._cache) > 1 and sum(known.items for known in self._cache.values()) > _CACHED_ITEMS_MAX:
                self._cache.popitem(last=False)

    def _forget(self, snapshot_id: SnapshotId) -> None:
        with self._lock:
            self._cache.pop(snapshot_id, None)


def _check_parent(workspace: TreeCapture, parent: SnapshotId | None, snapshot_id: SnapshotId) -> None:
    """What a capture left out as unchanged is in the snapshot that it was compared with, and nowhere else."""
    if workspace.based_on is not None and workspace.based_on.snapshot_id != parent:
        other = workspace.based_on.snapshot_id
        raise InvalidInput(
            "capture_of_other_parent",
            f"cannot save snapshot {snapshot_id}: its workspace was compared with {other}, not with {parent}",
        )


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
