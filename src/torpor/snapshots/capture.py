"""The workspace at the cut: phase 1 scans it and puts changed bytes aside while the agent is paused, phase 2
stores them.

A file is taken as unchanged only if its stamp is what it was, its ctime is older than 20 ms before the
previous cut, and the caller did not name it: stores through mmap move neither mtime nor size, so files that
the sandbox holds open for writing belong in `always_reread`. A directory is not even listed if a watch heard
nothing of it; docs/snapshot-format.md says why that is enough. Never follows a symbolic link; leaves out
devices, sockets and FIFOs, and says so.
"""

import logging
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path

from torpor.core.clock import Clock, SystemClock
from torpor.core.ids import SnapshotId
from torpor.snapshots.aside import Aside
from torpor.snapshots.backend import storage_errors
from torpor.snapshots.beneath import open_directory, open_root
from torpor.snapshots.chunks import store_bytes, store_file
from torpor.snapshots.objects import Content, ObjectWriter
from torpor.snapshots.scan import FRESH_NS, Scan, StagedDir, StagedFile, UnclearError
from torpor.snapshots.tree import (
    DirNode,
    FileNode,
    Node,
    TreeIndex,
    directories_below,
    directory_node,
    encode_directory,
)
from torpor.snapshots.watch import DirectoryWatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeCapture:
    """A workspace at one instant. What was put aside for it must stay until the snapshot is saved, and is the
    caller's to remove.

    Attributes:
        based_on: the index whose unchanged parts it shares; it can only be saved as that snapshot's child.
        generation: the watch's number of this cut; 0 when nothing is watched.
        staged_bytes: what was copied; `cloned_bytes` were not.
    """

    root: DirNode | StagedDir
    cut_wall_ns: int
    based_on: TreeIndex | None
    generation: int
    staged_bytes: int
    cloned_bytes: int

    @property
    def skipped(self) -> tuple[bytes, ...]:
        """Paths of what is not kept (devices, sockets, FIFOs)."""
        return tuple(_left_out_below(self.root, b""))

    def index(self, root: DirNode, snapshot_id: SnapshotId) -> TreeIndex:
        """What the next capture starts from, once this one is stored with that root."""
        return TreeIndex(root=root, cut_wall_ns=self.cut_wall_ns, snapshot_id=snapshot_id, generation=self.generation)


def _left_out_below(directory: DirNode | StagedDir, path: bytes) -> Iterator[bytes]:
    yield from (path + name for name in sorted(directory.left_out))
    for name, child in directory.children.items():
        if isinstance(child, DirNode | StagedDir):
            yield from _left_out_below(child, path + name + b"/")


def capture(
    workspace: Path,
    staging: Path,
    previous: TreeIndex | None = None,
    *,
    always_reread: AbstractSet[int] | None = frozenset(),
    leave_out: Callable[[bytes], bool] | None = None,
    watch: DirectoryWatch | None = None,
    clones: Path | None = None,
    clock: Clock | None = None,
) -> TreeCapture:
    """Phase 1. Nothing else may write to the workspace meanwhile. `staging` must exist and be empty.

    Args:
        always_reread: inode numbers of files that may be written to without a trace: all names of one are read, now
            and by the next capture. None: any file may.
        leave_out: says of such a path that it, and what is below it, is not to be captured.
        watch: of this workspace; what it arms and hears spares the next captures from looking at all files.
        clones: a directory on the workspace's file system for clones of big files; made if one is made.

    Raises:
        MachineUnfit: no_space, storage_failed.
        SandboxFailed: workspace_too_deep, workspace_too_large.
    """
    cut_wall_ns = (clock or SystemClock()).wall_ns()
    aside = Aside(staging, clones)
    look = watch.begin_cut(previous.generation if previous else 0) if watch else None
    with storage_errors(f"capture workspace {workspace}"), open_root(workspace) as root:
        scan = Scan(root, aside, previous, cut_wall_ns, always_reread, leave_out, watch)
        try:
            tree = scan.root(look)
        except UnclearError as unclear:
            logger.info("capture looks at all files: %s", unclear)
            scan = Scan(root, aside, previous, cut_wall_ns, always_reread, leave_out, watch)
            tree = scan.root(None)
    return TreeCapture(
        root=tree,
        cut_wall_ns=cut_wall_ns,
        based_on=previous,
        generation=watch.end_cut(scan.unsettled) if watch else 0,
        staged_bytes=aside.staged_bytes,
        cloned_bytes=aside.cloned_bytes,
    )


def watch_tree(workspace: Path, index: TreeIndex, watch: DirectoryWatch) -> TreeIndex:
    """Watch a workspace that was just filled, before anything runs in it; the index for its first capture."""
    watch.begin_cut(0)
    with open_root(workspace) as root:
        _arm(watch, root, b"", index.root)
    fresh_from_ns = index.cut_wall_ns - FRESH_NS
    unsettled = [
        path
        for path, node in directories_below(index.root)
        if any(child.stamp.ctime_ns >= fresh_from_ns or _has_links(child) for child in node.children.values())
    ]
    return replace(index, generation=watch.end_cut(unsettled))


def _arm(watch: DirectoryWatch, descriptor: int, path: bytes, node: DirNode) -> None:
    watch.arm(descriptor, path)
    for name, child in node.directories:
        with open_directory(name, descriptor, mode=child.meta.mode) as below:
            _arm(watch, below, path + name + b"/", child)


def _has_links(node: Node) -> bool:
    return isinstance(node, FileNode) and node.link != 0


def store_tree(tree: TreeCapture, writer: ObjectWriter) -> DirNode:
    """Phase 2: hash and store what changed, and give the tree that the next capture compares with."""
    return tree.root if isinstance(tree.root, DirNode) else _Storing(writer).directory(tree.root)


class _Storing:
    """One pass over a capture; the names of one inode share one node."""

    def __init__(self, writer: ObjectWriter) -> None:
        self._writer = writer
        self._linked: dict[int, FileNode] = {}

    def directory(self, staged: StagedDir) -> DirNode:
        children: dict[bytes, Node] = {}
        for name, child in sorted(staged.children.items()):
            if isinstance(child, StagedFile):
                children[name] = self._linked.get(child.link) or self._file(child)
            elif isinstance(child, StagedDir):
                children[name] = self.directory(child)
            else:
                children[name] = child
        return directory_node(
            staged.meta,
            staged.stamp,
            children,
            self._writer.put(encode_directory(children)),
            attributes=staged.attributes,
            left_out=staged.left_out,
        )

    def _file(self, staged: StagedFile) -> FileNode:
        node = FileNode(
            meta=staged.meta,
            stamp=staged.stamp,
            link=staged.link,
            content=self._content(staged),
            attributes=staged.attributes,
        )
        if node.link:
            self._linked[node.link] = node
        return node

    def _content(self, staged: StagedFile) -> Content:
        if isinstance(staged.source, Path):
            return store_file_at(staged.source, staged.stamp.size, self._writer)
        return store_bytes(staged.source, self._writer.put)


def store_file_at(path: Path, size: int, writer: ObjectWriter) -> Content:
    """Store the bytes of a file of our own: staged, or of an image."""
    with storage_errors(f"read {path}"), path.open("rb", buffering=0) as file:
        return store_file(file.fileno(), size, writer.put)
