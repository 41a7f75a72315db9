"""One walk over a workspace that stands still: what is as it was is taken from the index, the rest put aside.

What counts as unchanged, and which directories need not be listed, is in docs/snapshot-format.md. Goes one
component at a time, follows no link and opens nothing but directories and regular files.
"""

import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from torpor.core.errors import SandboxFailed
from torpor.snapshots.aside import Aside
from torpor.snapshots.attributes import read_attributes
from torpor.snapshots.beneath import open_directory, open_file
from torpor.snapshots.tree import (
    DEPTH_MAX,
    MODE_KEPT,
    ROOT_META,
    DirNode,
    FileNode,
    LinkNode,
    Meta,
    Node,
    Stamp,
    TreeIndex,
    directories_below,
)
from torpor.snapshots.watch import DirectoryWatch

FRESH_NS = 20_000_000
ENTRIES_MAX = 1_000_000
ATTRIBUTES_BYTES_MAX = 64 * 1024 * 1024
_TIME_NS_MAX = (1 << 63) - 1
_NEVER = -1 << 80


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedFile:
    """A file whose bytes were put aside: in memory, or in a file of our own."""

    meta: Meta
    stamp: Stamp
    link: int
    attributes: bytes
    source: bytes | Path


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedDir:
    meta: Meta
    stamp: Stamp
    attributes: bytes
    children: "Mapping[bytes, Found]"
    left_out: frozenset[bytes]


Found = Node | StagedFile | StagedDir


class UnclearError(Exception):
    """What is found does not fit what the watch heard, or that is not enough to go by."""


class _Look:
    """Which directories have to be listed, and which lead to one."""

    def __init__(self, paths: Iterable[bytes]) -> None:
        self._listed = set(paths)
        self._leads: dict[bytes, set[bytes]] = {}
        for path in self._listed:
            rest = path
            while rest:
                head, slash, name = rest[:-1].rpartition(b"/")
                rest = head + slash
                names = self._leads.setdefault(rest, set())
                if name in names:
                    break
                names.add(name)

    def is_listed(self, path: bytes) -> bool:
        return path in self._listed

    def leads(self, path: bytes) -> AbstractSet[bytes]:
        """Names in a directory of the directories to go into."""
        return self._leads.get(path, frozenset())

    def is_quiet(self, path: bytes) -> bool:
        """Whether there is nothing to see in the directory or below."""
        return path not in self._listed and path not in self._leads


@dataclass(frozen=True, slots=True)
class _Place:
    """A directory that the scan is at. `known` is what the index says of this directory, here or elsewhere."""

    descriptor: int
    path: bytes
    depth: int
    meta: Meta
    stamp: Stamp
    known: DirNode | None


class Scan:
    """One walk. Unchanged nodes of the previous tree are used again as they are, up to whole directories."""

    def __init__(
        self,
        root: int,
        aside: Aside,
        previous: TreeIndex | None,
        cut_wall_ns: int,
        always_reread: AbstractSet[int] | None,
        leave_out: Callable[[bytes], bool] | None,
        watch: DirectoryWatch | None,
    ) -> None:
        owner = os.fstat(root)
        self._root = Stamp.of(owner)
        self._descriptor = root
        self._uid, self._gid = owner.st_uid, owner.st_gid
        self._aside = aside
        self._previous = previous
        self._settled_before_ns = previous.cut_wall_ns - FRESH_NS if previous and always_reread is not None else 0
        self._fresh_from_ns = cut_wall_ns - FRESH_NS
        self._reread_all = always_reread is None
        self._always_reread = always_reread or frozenset[int]()
        self._leave_out = leave_out
        self._watch = watch
        self._look: _Look | None = None
        self._linked: dict[int, StagedFile] = {}
        self._entries = 0
        self._attribute_bytes = 0
        self._directories: dict[int, DirNode] | None = None
        self.unsettled: set[bytes] = set()

    def root(self, look: AbstractSet[bytes] | None) -> DirNode | StagedDir:
        """The whole tree; only these directories are listed, None for all.

        Raises:
            UnclearError: only if not all are.
        """
        known = self._previous.root if self._previous else None
        if known and look is not None and not self._reread_all:
            self._look = _Look([*look, *self._holding_open_files(known)])
        place = _Place(self._descriptor, b"", 0, ROOT_META, self._root, known)
        tree = self._directory(place) if self._look else self._listed(place)
        if self._look and _entries_of(tree) > ENTRIES_MAX:
            raise _too_many()
        return tree

    def _holding_open_files(self, root: DirNode) -> Iterator[bytes]:
        if self._always_reread:
            for path, node in directories_below(root):
                if not node.inodes.isdisjoint(self._always_reread):
                    yield path

    def _directory(self, place: _Place) -> DirNode | StagedDir:
        """A directory that is where it was: listed if need be, else only what is below is looked at."""
        look, known = self._look, place.known
        if look is None or known is None or look.is_listed(place.path):
            return self._listed(place)
        children: dict[bytes, Found] = dict(known.children)
        for name in look.leads(place.path):
            status = _stat(name, place.descriptor)
            child = known.children.get(name)
            if status is None or not isinstance(child, DirNode) or child.stamp.inode != status.st_ino:
                raise UnclearError(f"{(place.path + name)!r} is not what it was, and nothing was heard of that")
            with open_directory(name, place.descriptor, mode=stat.S_IMODE(status.st_mode)) as descriptor:
                children[name] = self._directory(self._below(place, descriptor, name, status, child))
        if all(children[name] is known.children[name] for name in look.leads(place.path)):
            return known
        return StagedDir(
            meta=known.meta,
            stamp=known.stamp,
            attributes=known.attributes,
            children=children,
            left_out=known.left_out,
        )

    def _below(
        self, place: _Place, descriptor: int, name: bytes, status: os.stat_result, known: DirNode | None
    ) -> _Place:
        path, depth = place.path + name + b"/", place.depth + 1
        if depth > DEPTH_MAX:
            raise SandboxFailed(
                "workspace_too_deep",
                f"cannot capture workspace: {path[:80]!r}... is over {DEPTH_MAX} levels deep",
                hint="Remove the directory inside the sandbox; until then the session has no new checkpoints.",
            )
        return _Place(descriptor, path, depth, self._meta(status), Stamp.of(status), known)

    def _listed(self, place: _Place, *, everything: bool = False) -> DirNode | StagedDir:
        """A directory by its list. `everything`: all below is listed too: what was heard does not go for it."""
        if self._watch:
            self._watch.arm(place.descriptor, place.path)
        known = place.known
        children: dict[bytes, Found] = {}
        left_out: set[bytes] = set()
        before: Mapping[bytes, Node] = known.children if known else {}
        is_same = known is not None and known.meta == place.meta
        for entry in self._list(place.descriptor):
            name = os.fsencode(entry.name)
            if self._leave_out and self._leave_out(place.path + name):
                continue
            one = before.get(name)
            try:
                status = entry.stat(follow_symlinks=False)
                if one is not None and self._is_unchanged(one, status):
                    children[name] = one
                    if status.st_nlink > 1:
                        self.unsettled.add(place.path)
                    continue
                node = self._changed(place, status, name, one, everything=everything)
            except FileNotFoundError:  # Only a directory that is in use outside of a sandbox changes under a scan.
                continue
            if node is None:
                left_out.add(name)
                continue
            children[name] = node
            is_same = is_same and node is one
        attributes = self._attributes_of(place)
        is_same = is_same and len(children) == len(before)
        if known and is_same and (left_out, attributes) == (known.left_out, known.attributes):
            return known if known.stamp == place.stamp else replace(known, stamp=place.stamp)
        return StagedDir(
            meta=place.meta,
            stamp=place.stamp,
            attributes=attributes,
            children=children,
            left_out=frozenset(left_out),
        )

    def _list(self, descriptor: int) -> list[os.DirEntry[str]]:
        room = ENTRIES_MAX - self._entries
        with os.scandir(descriptor) as listing:
            entries = list(islice(listing, room + 1))
        self._entries += len(entries)
        if len(entries) > room:
            raise _too_many()
        return entries

    def _is_unchanged(self, known: Node, status: os.stat_result) -> bool:
        return (
            not isinstance(known, DirNode)
            and known.stamp == (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            and status.st_ctime_ns < self._settled_before_ns
            and status.st_ino not in self._always_reread
        )

    def _may_be_written(self, status: os.stat_result) -> bool:
        return self._reread_all or status.st_ino in self._always_reread

    def _changed(
        self, place: _Place, status: os.stat_result, name: bytes, known: Node | None, *, everything: bool
    ) -> Found | None:
        """A node for what is new or may have changed; None for what a tree can't hold."""
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR:
            return self._subdirectory(place, status, name, known, everything=everything)
        if status.st_ctime_ns >= self._fresh_from_ns or self._may_be_written(status) or status.st_nlink > 1:
            self.unsettled.add(place.path)
        if kind == stat.S_IFREG:
            return self._file(place, name, status, known)
        if kind == stat.S_IFLNK:
            target = os.readlink(name, dir_fd=place.descriptor)
            return LinkNode(meta=self._meta(status), stamp=Stamp.of(status), target=target)
        return None

    def _subdirectory(
        self, place: _Place, status: os.stat_result, name: bytes, known: Node | None, *, everything: bool
    ) -> DirNode | StagedDir:
        here = known if isinstance(known, DirNode) and known.stamp.inode == status.st_ino else None
        look = None if everything or not here else self._look
        if here and look and look.is_quiet(place.path + name + b"/") and here.meta == self._meta(status):
            return here
        with open_directory(name, place.descriptor, mode=stat.S_IMODE(status.st_mode)) as descriptor:
            below = self._below(place, descriptor, name, status, here or self._moved(status.st_ino))
            return self._directory(below) if look else self._listed(below, everything=True)

    def _moved(self, inode: int) -> DirNode | None:
        """What is known of a directory that was elsewhere: the files in it have the stamps they had."""
        if self._directories is None:
            known = directories_below(self._previous.root) if self._previous else ()
            self._directories = {node.stamp.inode: node for _, node in known}
        return self._directories.get(inode)

    def _file(self, place: _Place, name: bytes, status: os.stat_result, known: Node | None) -> StagedFile:
        linked = self._linked.get(status.st_ino)
        if linked is not None:
            return linked
        group = known.link if isinstance(known, FileNode) and known.stamp.inode == status.st_ino else 0
        if status.st_nlink > 1 and not group and self._look:
            raise UnclearError(f"{(place.path + name)!r} has a new link, its other names may be anywhere")
        with open_file(name, place.descriptor, mode=stat.S_IMODE(status.st_mode)) as descriptor:
            opened = os.fstat(descriptor)
            stamp = Stamp.of(opened)
            if self._may_be_written(status):
                # What is stored through a mapping from now on, until it is gone, may leave no trace either.
                stamp = stamp._replace(ctime_ns=_NEVER)
            node = StagedFile(
                meta=self._meta(status),  # Not of `opened`, which may have been lent a permission.
                stamp=stamp,
                link=(group or secrets.randbits(64) or 1) if opened.st_nlink > 1 else 0,
                attributes=self._read_attributes(descriptor, place.path + name),
                source=self._aside.take(descriptor, opened.st_size),
            )
        if node.link:
            self._linked[status.st_ino] = node
        return node

    def _attributes_of(self, place: _Place) -> bytes:
        known = place.known
        if not place.path:
            return b""
        if known and known.stamp == place.stamp and place.stamp.ctime_ns < self._settled_before_ns:
            return known.attributes
        return self._read_attributes(place.descriptor, place.path)

    def _read_attributes(self, descriptor: int, path: bytes) -> bytes:
        attributes = read_attributes(descriptor, path)
        self._attribute_bytes += len(attributes)
        if self._attribute_bytes > ATTRIBUTES_BYTES_MAX:
            raise SandboxFailed(
                "workspace_too_large",
                f"cannot capture workspace: it has over {ATTRIBUTES_BYTES_MAX} bytes of extended attributes",
                hint="Remove some inside the sandbox; until then the session has no new checkpoints.",
            )
        return attributes

    def _meta(self, status: os.stat_result) -> Meta:
        uid = 0 if status.st_uid == self._uid else status.st_uid
        gid = 0 if status.st_gid == self._gid else status.st_gid
        mtime_ns = max(
            -_TIME_NS_MAX, min(status.st_mtime_ns, _TIME_NS_MAX)
        )  # Some file systems keep any 64 bits of seconds.
        return Meta(status.st_mode & MODE_KEPT, uid, gid, mtime_ns)


def _stat(name: bytes, parent: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _entries_of(node: DirNode | StagedDir) -> int:
    if isinstance(node, DirNode):
        return node.entries
    below = sum(_entries_of(child) for child in node.children.values() if isinstance(child, DirNode | StagedDir))
    return len(node.children) + len(node.left_out) + below


def _too_many() -> SandboxFailed:
    return SandboxFailed(
        "workspace_too_large",
        f"cannot capture workspace: it has over {ENTRIES_MAX} files and directories",
        hint="Keep large trees in the image, or remove some inside the sandbox.",
    )
