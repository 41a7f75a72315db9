"""The workspace at the cut: phase 1 scans it and puts changed bytes aside while the agent is paused, phase 2
stores them.

A file is taken as unchanged only if its stamp is what it was, its ctime is older than 20 ms before the
previous cut, and the caller did not name it: stores through mmap move neither mtime nor size, so files that
the sandbox holds open for writing belong in `always_reread`. Never follows a symbolic link; leaves out
devices, sockets and FIFOs, and says so.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torpor.core.clock import Clock, SystemClock
from torpor.core.errors import SandboxFailed
from torpor.snapshots.backend import storage_errors
from torpor.snapshots.beneath import create_file, open_directory, open_file, open_root, read_blocks
from torpor.snapshots.objects import BLOCK_BYTES, Content, ObjectWriter, store_content
from torpor.snapshots.tree import (
    DEPTH_MAX,
    MODE_KEPT,
    DirNode,
    FileNode,
    LinkNode,
    Meta,
    Node,
    Stamp,
    TreeIndex,
    directory_node,
    encode_directory,
)

FRESH_NS = 20_000_000
ENTRIES_MAX = 1_000_000
_IN_MEMORY_FILE_BYTES_MAX = 128 * 1024
_IN_MEMORY_BYTES_MAX = 64 * 1024 * 1024
_TIME_NS_MAX = (1 << 63) - 1
_FICLONE = 0x40049409
_NO_REFLINK = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedFile:
    """A file whose bytes were put aside: in memory, or in a file of the staging directory."""

    meta: Meta
    stamp: Stamp
    link: int
    source: bytes | Path


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedDir:
    meta: Meta
    children: "Mapping[bytes, Node | StagedFile | StagedDir]"


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeCapture:
    """A workspace at one instant. Its staging directory must stay until the snapshot is saved, and is the
    caller's to remove.

    Attributes:
        based_on: the index whose unchanged parts it shares; it can only be saved as that snapshot's child.
        skipped: paths of what is not kept (devices, sockets, FIFOs).
        staged_bytes: what was copied.
    """

    root: DirNode | StagedDir
    cut_wall_ns: int
    based_on: TreeIndex | None
    skipped: tuple[bytes, ...]
    staged_bytes: int


def capture(
    workspace: Path,
    staging: Path,
    previous: TreeIndex | None = None,
    *,
    always_reread: AbstractSet[int] = frozenset(),
    leave_out: Callable[[bytes], bool] | None = None,
    clock: Clock | None = None,
) -> TreeCapture:
    """Phase 1. Nothing else may write to the workspace meanwhile. `staging` must exist and be empty.

    Args:
        always_reread: inode numbers of files that may have changed without a trace; so all names of one are read again.
        leave_out: says of such a path that it, and what is below it, is not to be captured.

    Raises:
        MachineUnfit: no_space, storage_failed.
        SandboxFailed: workspace_too_deep, workspace_too_large.
    """
    cut_wall_ns = (clock or SystemClock()).wall_ns()
    with (
        storage_errors(f"capture workspace {workspace}"),
        open_root(workspace) as root,
        open_root(staging) as aside,
    ):
        scan = _Scan(root, aside, staging, previous, always_reread, leave_out)
        tree = scan.directory(root, previous and previous.root, b"", Meta(0o700, 0, 0, 0), 0)
    return TreeCapture(
        root=tree,
        cut_wall_ns=cut_wall_ns,
        based_on=previous,
        skipped=tuple(scan.skipped),
        staged_bytes=scan.staged_bytes,
    )


class _Scan:
    """One walk. Unchanged nodes of the previous tree are used again as they are, up to whole directories."""

    def __init__(
        self,
        root: int,
        aside: int,
        staging: Path,
        previous: TreeIndex | None,
        always_reread: AbstractSet[int],
        leave_out: Callable[[bytes], bool] | None,
    ) -> None:
        owner = os.fstat(root)
        self._uid, self._gid = owner.st_uid, owner.st_gid
        self._aside = aside
        self._staging = staging
        self._settled_before_ns = previous.cut_wall_ns - FRESH_NS if previous else 0
        self._always_reread = always_reread
        self._leave_out = leave_out
        self._linked: dict[int, Node | StagedFile] = {}
        self._entries = 0
        self._files_aside = 0
        self._in_memory_bytes = 0
        self._can_reflink = True
        self.skipped: list[bytes] = []
        self.staged_bytes = 0

    def directory(
        self, descriptor: int, previous: DirNode | None, path: bytes, meta: Meta, depth: int
    ) -> DirNode | StagedDir:
        if depth > DEPTH_MAX:
            raise SandboxFailed(
                "workspace_too_deep",
                f"cannot capture workspace: {path[:80]!r}... is over {DEPTH_MAX} levels deep",
                hint="Remove the directory inside the sandbox; until then the session has no new checkpoints.",
            )
        children: dict[bytes, Node | StagedFile | StagedDir] = {}
        before: Mapping[bytes, Node] = previous.children if previous else {}
        is_same = previous is not None and previous.meta == meta
        for entry in self._list(descriptor):
            name = os.fsencode(entry.name)
            if self._leave_out and self._leave_out(path + name):
                continue
            known = before.get(name)
            try:
                status = entry.stat(follow_symlinks=False)
                if known is not None and self._is_unchanged(known, status):
                    children[name] = known
                    continue
                node = self._changed(descriptor, status, name, known, path, depth)
            except FileNotFoundError:  # Only a directory that is in use outside of a sandbox changes under a scan.
                continue
            if node is None:
                self.skipped.append(path + name)
                continue
            children[name] = node
            is_same = is_same and node is known
        if previous is not None and is_same and len(children) == len(before):
            return previous
        return StagedDir(meta=meta, children=children)

    def _list(self, descriptor: int) -> list[os.DirEntry[str]]:
        room = ENTRIES_MAX - self._entries
        with os.scandir(descriptor) as listing:
            entries = list(islice(listing, room + 1))
        self._entries += len(entries)
        if len(entries) > room:
            raise SandboxFailed(
                "workspace_too_large",
                f"cannot capture workspace: it has over {ENTRIES_MAX} files and directories",
                hint="Keep large trees in the image, or remove some inside the sandbox.",
            )
        return entries

    def _is_unchanged(self, known: Node, status: os.stat_result) -> bool:
        return (
            not isinstance(known, DirNode)
            and known.stamp == (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            and status.st_ctime_ns < self._settled_before_ns
            and status.st_ino not in self._always_reread
        )

    def _changed(
        self, parent: int, status: os.stat_result, name: bytes, known: Node | None, path: bytes, depth: int
    ) -> "Node | StagedFile | StagedDir | None":
        """A node for what is new or may have changed; None for what a tree can't hold."""
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFREG:
            return self._file(parent, name, status)
        if kind == stat.S_IFDIR:
            with open_directory(name, parent, mode=stat.S_IMODE(status.st_mode)) as descriptor:
                below = known if isinstance(known, DirNode) else None
                return self.directory(descriptor, below, path + name + b"/", self._meta(status), depth + 1)
        if kind == stat.S_IFLNK:
            target = os.readlink(name, dir_fd=parent)
            return LinkNode(meta=self._meta(status), stamp=Stamp.of(status), target=target)
        return None

    def _file(self, parent: int, name: bytes, status: os.stat_result) -> "Node | StagedFile":
        known = self._linked.get(status.st_ino)
        if known is not None:
            return known
        with open_file(name, parent, mode=stat.S_IMODE(status.st_mode)) as descriptor:
            opened = os.fstat(descriptor)
            node = StagedFile(
                meta=self._meta(status),  # Not of `opened`, which may have been lent a permission.
                stamp=Stamp.of(opened),
                link=opened.st_ino if opened.st_nlink > 1 else 0,
                source=self._put_aside(descriptor, opened.st_size),
            )
        if node.link:
            self._linked[node.link] = node
        return node

    def _put_aside(self, descriptor: int, size: int) -> bytes | Path:
        self.staged_bytes += size
        if size <= _IN_MEMORY_FILE_BYTES_MAX and self._in_memory_bytes + size <= _IN_MEMORY_BYTES_MAX:
            self._in_memory_bytes += size
            return os.pread(descriptor, size, 0).ljust(size, b"\0")
        name = b"%d" % self._files_aside
        self._files_aside += 1
        with create_file(name, self._aside) as copy:
            if not (self._can_reflink and self._reflink(descriptor, copy)):
                _copy_data(descriptor, copy, size)
        return self._staging / os.fsdecode(name)

    def _reflink(self, source: int, copy: int) -> bool:
        try:
            fcntl.ioctl(copy, _FICLONE, source)
        except OSError as error:
            if error.errno not in _NO_REFLINK:
                raise
            self._can_reflink = False
        return self._can_reflink

    def _meta(self, status: os.stat_result) -> Meta:
        uid = 0 if status.st_uid == self._uid else status.st_uid
        gid = 0 if status.st_gid == self._gid else status.st_gid
        mtime_ns = max(
            -_TIME_NS_MAX, min(status.st_mtime_ns, _TIME_NS_MAX)
        )  # Some file systems keep any 64 bits of seconds.
        return Meta(status.st_mode & MODE_KEPT, uid, gid, mtime_ns)


def _copy_data(source: int, copy: int, size: int) -> None:
    """Copy what is not a hole, in the kernel."""
    os.ftruncate(copy, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
            end = min(size, os.lseek(source, at, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        os.lseek(copy, at, os.SEEK_SET)
        while at < end:
            sent = os.sendfile(copy, source, at, end - at)
            if sent == 0:
                return
            at += sent


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
        return directory_node(staged.meta, children, self._writer.put(encode_directory(children)))

    def _file(self, staged: StagedFile) -> FileNode:
        node = FileNode(meta=staged.meta, stamp=staged.stamp, link=staged.link, content=self._content(staged))
        if node.link:
            self._linked[node.link] = node
        return node

    def _content(self, staged: StagedFile) -> Content:
        size, data = staged.stamp.size, staged.source
        if isinstance(data, Path):
            return store_file_at(data, size, self._writer)
        blocks = ((at // BLOCK_BYTES, data[at : at + BLOCK_BYTES]) for at in range(0, size, BLOCK_BYTES))
        return store_content(blocks, size, self._writer.put)


def store_file_at(path: Path, size: int, writer: ObjectWriter) -> Content:
    """Store the bytes of a file of our own: staged, or of an image."""
    with storage_errors(f"read {path}"), path.open("rb", buffering=0) as file:
        return store_content(read_blocks(file.fileno(), size), size, writer.put)
