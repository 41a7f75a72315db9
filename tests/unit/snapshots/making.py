"""Small worlds for the store's tests: images of numbered pages, workspaces, a store in a temporary directory."""

import contextlib
import itertools
import os
import random
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from torpor.core.ids import SnapshotId
from torpor.snapshots.backend import LocalDirectory
from torpor.snapshots.capture import TreeCapture, capture, store_tree
from torpor.snapshots.cipher import Key, key_of
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.store import SavedSnapshot, SnapshotStore
from torpor.snapshots.tree import DirNode, FileNode, Node, Stamp, TreeIndex, directory_node

SETTLED_NS = 10_000_000_000
KEY = key_of(b"the key of the tests' sessions..")
IDS = ContentIds(b"the secret of the tests' tenant..")


class StillClock:
    def __init__(self, wall_ns: int) -> None:
        self.now_ns = wall_ns

    def wall_ns(self) -> int:
        return self.now_ns

    def monotonic(self) -> float:
        return 0.0


def page(number: int) -> bytes:
    """A page of its own for each number, which does not compress."""
    return random.Random(number).randbytes(4096)


def pages(numbers: Iterable[int]) -> bytes:
    return b"".join(page(number) for number in numbers)


def variant(number: int, version: int) -> bytes:
    """A later version of a page: a few of its bytes are others."""
    whole, at = page(number), version * 32 % 4096
    return whole[:at] + version.to_bytes(32, "big") + whole[at + 32 :] if version else whole


def variants(pairs: Iterable[tuple[int, int]]) -> bytes:
    """Pages by number and version."""
    return b"".join(variant(*pair) for pair in pairs)


class World:
    """A store, an image directory and a workspace below one directory."""

    def __init__(self, root: Path, store: Path | None = None) -> None:
        self.root = root
        self.store_directory = store or root / "store"
        self.image = root / "image"
        self.workspace = root / "workspace"
        self.image.mkdir()
        self.workspace.mkdir()
        self.backend = LocalDirectory(self.store_directory)
        self.store = self.new_store()
        self._numbers = itertools.count()

    def new_store(self) -> SnapshotStore:
        """One that remembers nothing."""
        return SnapshotStore(self.backend, IDS)

    def write_image(self, memory: bytes, **others: bytes) -> None:
        (self.image / "pages.img").write_bytes(memory)
        for name, data in {"checkpoint": b"kernel state " * 1000, "pages_meta": b"segments", **others}.items():
            (self.image / f"{name}.img").write_bytes(data)

    def fresh(self, name: str) -> Path:
        path = self.root / f"{name}-{next(self._numbers)}"
        path.mkdir()
        return path

    def save(
        self,
        name: str,
        parent: SavedSnapshot | None = None,
        *,
        index: TreeIndex | None = None,
        pins: Mapping[str, str] | None = None,
        store: SnapshotStore | None = None,
        key: Key = KEY,
        compared_with: SavedSnapshot | None = None,
    ) -> SavedSnapshot:
        staging = self.fresh("staging")
        captured = capture(self.workspace, staging, index)
        store = store or self.store
        with store.lease() as lease:
            saved = store.save(
                image_dir=self.image,
                workspace=captured,
                parent=parent and parent.ref,
                compared_with=compared_with and compared_with.ref,
                pins=pins or {},
                snapshot_id=SnapshotId(f"snp_{name}"),
                key=key,
                lease=lease,
            )
        shutil.rmtree(staging)
        return saved

    def restored_image(self, saved: SavedSnapshot) -> dict[str, bytes]:
        target = self.root / f"restored-{next(self._numbers)}"
        self.store.restore_image(saved.ref, target)
        return contents(target)

    def restored_workspace(self, saved: SavedSnapshot) -> Path:
        target = self.fresh("restored")
        self.store.restore_workspace(saved.ref, target)
        return target

    def object_paths(self) -> list[Path]:
        return [path for path in self.store_directory.rglob("*") if path.is_file()]


@contextlib.contextmanager
def tiny_disk_at(path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def settled(index: TreeIndex) -> TreeIndex:
    """The index as if its cut had come long after every change, so that no file counts as fresh."""
    return replace(index, cut_wall_ns=index.cut_wall_ns + SETTLED_NS)


def with_stamps_of(index: TreeIndex, workspace: Path) -> TreeIndex:
    """The index as if no file's stat had moved since: what stores through mmap look like."""
    return replace(index, root=_restamped(index.root, workspace))


def _restamped(node: DirNode, directory: Path) -> DirNode:
    children: dict[bytes, Node] = {}
    for name, child in node.children.items():
        path = directory / os.fsdecode(name)
        if isinstance(child, DirNode):
            children[name] = _restamped(child, path)
        else:
            children[name] = replace(child, stamp=Stamp.of(path.lstat()))
    stamp = Stamp.of(directory.lstat())
    return directory_node(node.meta, stamp, children, node.digest, attributes=node.attributes, left_out=node.left_out)


def time_stamps_move(directory: Path) -> None:
    """Return when a change in the file system gets another time than those so far; some count in milliseconds."""
    probe = directory / "time-stamps"
    probe.touch()
    before = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == before:
        os.utime(probe)


class HashingWriter:
    """Stores nothing."""

    def put(self, data: bytes) -> bytes:
        return IDS.of_object(data)


def flat(captured: TreeCapture) -> dict[bytes, object]:
    """All that a capture found, by path; hard links by the first of their names."""
    found: dict[bytes, object] = {}
    groups: dict[int, bytes] = {}

    def add(node: Node, path: bytes) -> None:
        if isinstance(node, DirNode):
            found[path] = (node.meta, node.attributes, node.left_out)
            for name, child in sorted(node.children.items()):
                add(child, path + b"/" + name)
        elif isinstance(node, FileNode):
            group = groups.setdefault(node.link, path) if node.link else None
            found[path] = (node.meta, node.attributes, node.size, node.content.encoded, group)
        else:
            found[path] = (node.meta, node.target)

    add(store_tree(captured, HashingWriter()), b"")  # type: ignore[arg-type]
    return found
