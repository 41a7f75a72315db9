"""Whether snapshots would restore: a quick look at all that says what they are made of, or a slow one at every byte.

The quick look opens manifests and the indexes of packs, compares the packs' lengths, and puts the images together as
far as names go. The slow one reads whole packs, and walks through files and trees.
"""

from collections.abc import Iterator, Mapping
from hashlib import sha256

from torpor.core.errors import Damaged, NotFound
from torpor.snapshots.backend import Backend
from torpor.snapshots.bases import Bases
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.manifest import Manifest, PagedFile, SnapshotRef, decode_extents, load_manifest, manifest_key
from torpor.snapshots.objects import ObjectReader, Objects, chunks_of, read_chunk
from torpor.snapshots.pack import Frame, PackIndex, PackRef, damaged, missing, read_pack_index
from torpor.snapshots.pages import base_numbers, page_list_of
from torpor.snapshots.tree import DIRECTORY, FILE, decode_directory


class Verifier:
    """Looks at snapshots, and at each of their packs once. Hold a store lease meanwhile."""

    def __init__(self, backend: Backend, ids: ContentIds, *, read_data: bool) -> None:
        self._backend = backend
        self._ids = ids
        self._read_data = read_data
        self._entries = {entry.key: entry for entry in backend.entries("packs/")}
        self._packs: dict[PackRef, PackIndex | Damaged] = {}
        self._bases = Bases(backend)
        self.named: set[str] = set()
        """Keys of the manifests, and of all packs that these name."""

    def problems_of(self, ref: SnapshotRef) -> list[str]:
        """One sentence for each problem; of a pack only the first."""
        self.named.add(manifest_key(ref.id))
        try:
            manifest = load_manifest(self._backend, ref)
        except Damaged as error:
            return [str(error)]
        self.named.update(pack.key for pack in manifest.packs)
        packs: dict[PackRef, PackIndex] = {}
        problems: list[str] = []
        for pack in dict.fromkeys(manifest.packs):
            found = self._pack(pack, manifest)
            if isinstance(found, Damaged):
                problems.append(str(found))
            else:
                packs[pack] = found
        if problems:
            return list(dict.fromkeys(problems))
        problems = list(_problems_of_image(manifest, packs))
        if self._read_data:
            objects = ObjectReader(self._backend, self._ids, [packs[pack] for pack in manifest.object_packs])
            problems += _problems_of_contents(manifest, objects)
        return problems

    def _pack(self, ref: PackRef, manifest: Manifest) -> PackIndex | Damaged:
        if ref not in self._packs:
            try:
                self._packs[ref] = self._look_at(ref, manifest)
            except Damaged as error:
                self._packs[ref] = error
        return self._packs[ref]

    def _look_at(self, ref: PackRef, manifest: Manifest) -> PackIndex:
        if self._read_data:
            return self._look_at_data(ref, manifest)
        pack = read_pack_index(self._backend, ref)
        entry = self._entries.get(ref.key)
        if entry is not None and entry.stored_bytes != pack.stored_bytes:
            raise damaged(ref.key, f"it has {entry.stored_bytes} bytes, not {pack.stored_bytes}")
        return pack

    def _look_at_data(self, ref: PackRef, manifest: Manifest) -> PackIndex:
        try:
            data = self._backend.get(ref.key)
        except NotFound as error:
            raise missing(ref.key) from error
        pack = PackIndex(ref, data[: ref.head_bytes])
        numbers = {known.name: number for number, known in enumerate(manifest.page_packs)}

        def base_of(frame: Frame) -> bytes:
            needed = [manifest.page_packs[number] for number in base_numbers(pack, numbers)]
            return self._bases.of_frame(pack, frame, needed)

        pack.check(data, self._ids, base_of)
        return pack


def _problems_of_image(manifest: Manifest, packs: Mapping[PackRef, PackIndex]) -> Iterator[str]:
    for file in manifest.files:
        try:
            if isinstance(file, PagedFile):
                _verify_paged(file, [packs[ref] for ref in manifest.page_packs])
        except Damaged as error:
            yield str(error)


def _problems_of_contents(manifest: Manifest, objects: Objects) -> Iterator[str]:
    for file in manifest.files:
        try:
            if not isinstance(file, PagedFile):
                _verify_content(file.content, file.size, objects)
        except Damaged as error:
            yield str(error)
    yield from _problems_of_tree(manifest.tree_root, objects, "workspace")


def _verify_paged(file: PagedFile, packs: list[PackIndex]) -> None:
    extents = decode_extents(file.extents)
    numbers = {pack.ref.name: number for number, pack in enumerate(packs)}
    for number in {extent.pack for extent in extents}:
        base_numbers(packs[number], numbers)
    if sha256(page_list_of(extents, packs)).digest() != file.page_list:
        raise damaged(f"image file {file.name}", "its extents do not give the pages that were saved")


def _verify_content(encoded: bytes, size: int, objects: Objects) -> None:
    for chunk in chunks_of(encoded, size, objects):
        read_chunk(chunk, objects)


def _problems_of_tree(digest: bytes, objects: Objects, path: str) -> Iterator[str]:
    try:
        entries = decode_directory(objects.get(digest))
    except Damaged as error:
        yield f"{path}: {error}"
        return
    for entry in entries:
        below = f"{path}/{entry.name.decode(errors='backslashreplace')}"
        if entry.kind == DIRECTORY:
            yield from _problems_of_tree(entry.digest, objects, below)
        elif entry.kind == FILE:
            try:
                _verify_content(entry.content, entry.size, objects)
            except Damaged as error:
                yield f"{below}: {error}"
