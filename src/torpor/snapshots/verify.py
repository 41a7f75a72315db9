"""A slow look at everything a snapshot needs: every byte of its packs, and that its files and tree come
together.
"""

from collections.abc import Iterator
from hashlib import sha256

from torpor.core.errors import Damaged, NotFound
from torpor.snapshots.backend import Backend
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.manifest import Manifest, PagedFile, decode_extents
from torpor.snapshots.objects import ObjectReader, Objects, chunks_of, read_chunk
from torpor.snapshots.pack import PackIndex, PackRef, damaged, missing
from torpor.snapshots.tree import DIRECTORY, FILE, decode_directory


def problems_of(manifest: Manifest, backend: Backend, ids: ContentIds) -> list[str]:
    """One sentence for each problem; of a pack only the first."""
    packs: dict[PackRef, PackIndex] = {}
    problems: list[str] = []
    for ref in dict.fromkeys(manifest.packs):
        try:
            packs[ref] = _verified_pack(ref, backend, ids)
        except Damaged as error:
            problems.append(str(error))
    if problems:
        return problems
    objects = ObjectReader(backend, ids, [packs[ref] for ref in manifest.object_packs])
    for file in manifest.files:
        try:
            if isinstance(file, PagedFile):
                _verify_paged(file, [packs[ref] for ref in manifest.page_packs])
            else:
                _verify_content(file.content, file.size, objects)
        except Damaged as error:
            problems.append(str(error))
    return problems + list(_problems_of_tree(manifest.tree_root, objects, "workspace"))


def _verified_pack(ref: PackRef, backend: Backend, ids: ContentIds) -> PackIndex:
    try:
        data = backend.get(ref.key)
    except NotFound as error:
        raise missing(ref.key) from error
    pack = PackIndex(ref, data[: ref.head_bytes])
    pack.check(data, ids)
    return pack


def _verify_paged(file: PagedFile, packs: list[PackIndex]) -> None:
    extents = decode_extents(file.extents)
    page_list = b"".join(packs[extent.pack].ids_of(extent.first, extent.count) for extent in extents)
    if sha256(page_list).digest() != file.page_list:
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
