"""A stored tree back on disk: whole into an empty directory, or laid over one that is in use.

Both go one component at a time and follow no symbolic link, so nothing is written outside of the directory,
whatever the agent put into its workspace. `materialize` keeps everything a tree holds; `export` is for a
person's own directory.
"""

import contextlib
import os
import secrets
import stat
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path

from torpor.core.clock import Clock
from torpor.core.errors import InvalidInput
from torpor.core.ids import SnapshotId
from torpor.snapshots.attributes import write_attributes
from torpor.snapshots.backend import storage_errors
from torpor.snapshots.beneath import (
    create_file,
    open_directory,
    open_file,
    open_root,
)
from torpor.snapshots.chunks import holds_content, write_content
from torpor.snapshots.objects import Objects, load_content
from torpor.snapshots.tree import (
    DIRECTORY,
    FILE,
    ROOT_META,
    DirNode,
    Entry,
    FileNode,
    LinkNode,
    Meta,
    Node,
    Stamp,
    TreeIndex,
    decode_directory,
    directory_node,
)

# Files that programs on the host run or obey when somebody merely looks at the directory.
_RUN_BY_HOST = (b"/.git/hooks/", b"/.git/config", b"/.envrc", b"/.vscode/")


def materialize(
    root: bytes, destination: Path, objects: Objects, *, snapshot_id: SnapshotId, clock: Clock
) -> TreeIndex:
    """Write the whole tree into `destination`, an empty directory that nothing else touches.

    Raises:
        InvalidInput: directory_not_empty.
        Damaged: snapshot_damaged, snapshot_object_missing.
        MachineUnfit: no_space, storage_failed.
    """
    with storage_errors(f"materialize workspace {destination}"), open_root(destination) as descriptor:
        if any(destination.iterdir()):
            raise InvalidInput("directory_not_empty", f"cannot materialize workspace {destination}: it is not empty")
        filling = _Filling(descriptor, objects)
        node = filling.directory(descriptor, root, ROOT_META, b"", b"")
        filling.settle_links()
    return TreeIndex(root=node, cut_wall_ns=clock.wall_ns(), snapshot_id=snapshot_id)


def entries_ahead(directory: bytes, objects: Objects) -> list[Entry]:
    """A directory's entries, of which the contents are announced: they are read next, in this order."""
    entries = decode_directory(objects.get(directory))
    named = (entry.digest if entry.kind == DIRECTORY else entry.content[1:] for entry in entries)
    objects.ahead(digest for digest in named if digest)
    return entries


class _Filling:
    def __init__(self, root: int, objects: Objects) -> None:
        owner = os.fstat(root)
        self._root = root
        self._objects = objects
        self._uid, self._gid = owner.st_uid, owner.st_gid
        self._first_names: dict[int, tuple[bytes, FileNode]] = {}
        self._linked: list[tuple[dict[bytes, Node], bytes]] = []

    def directory(self, descriptor: int, digest: bytes, meta: Meta, attributes: bytes, path: bytes) -> DirNode:
        children: dict[bytes, Node] = {}
        for entry in entries_ahead(digest, self._objects):
            children[entry.name] = self._entry(descriptor, entry, path)
            if entry.link:
                self._linked.append((children, entry.name))
        if meta is not ROOT_META:
            write_attributes(descriptor, attributes)
            self._set_meta(descriptor, meta)
        stamp = Stamp.of(os.fstat(descriptor))
        return directory_node(meta, stamp, children, digest, attributes=attributes)

    def _entry(self, parent: int, entry: Entry, path: bytes) -> Node:
        if entry.kind == FILE:
            return self._file(parent, entry, path)
        if entry.kind == DIRECTORY:
            os.mkdir(entry.name, 0o700, dir_fd=parent)
            with open_directory(entry.name, parent) as descriptor:
                below = path + entry.name + b"/"
                return self.directory(descriptor, entry.digest, entry.meta, entry.attributes, below)
        os.symlink(entry.target, entry.name, dir_fd=parent)
        times = (entry.meta.mtime_ns, entry.meta.mtime_ns)
        os.utime(entry.name, dir_fd=parent, ns=times, follow_symlinks=False)
        status = os.stat(entry.name, dir_fd=parent, follow_symlinks=False)
        return LinkNode(meta=entry.meta, stamp=Stamp.of(status), target=entry.target)

    def _file(self, parent: int, entry: Entry, path: bytes) -> FileNode:
        first = self._first_names.get(entry.link)
        if first and self._link(first[0], parent, entry.name):
            return first[1]
        with create_file(entry.name, parent) as descriptor:
            write_content(descriptor, entry.content, entry.size, self._objects)
            write_attributes(descriptor, entry.attributes)
            self._set_meta(descriptor, entry.meta)
            stamp = Stamp.of(os.fstat(descriptor))
        content = load_content(entry.content, entry.size, self._objects)
        node = FileNode(meta=entry.meta, stamp=stamp, link=entry.link, content=content, attributes=entry.attributes)
        if entry.link:
            self._first_names[entry.link] = path + entry.name, node
        return node

    def settle_links(self) -> None:
        """Note the stamps of files with several names again: each further name moved the ctime."""
        stamps: dict[int, Stamp] = {}
        for path, _ in self._first_names.values():
            with contextlib.suppress(OSError):  # Its path may be too long to say: then it has no other name.
                stamp = Stamp.of(os.stat(path, dir_fd=self._root, follow_symlinks=False))
                stamps[stamp.inode] = stamp
        for children, name in self._linked:
            node = children[name]
            if not isinstance(node, DirNode):
                children[name] = replace(node, stamp=stamps.get(node.stamp.inode, node.stamp))

    def _link(self, first: bytes, parent: int, name: bytes) -> bool:
        """Make a hard link, unless the path of the first name is too long to say."""
        try:
            os.link(first, name, src_dir_fd=self._root, dst_dir_fd=parent, follow_symlinks=False)
        except OSError:
            return False
        return True

    def _set_meta(self, descriptor: int, meta: Meta) -> None:
        if (meta.uid or meta.gid) and os.geteuid() == 0:
            os.fchown(descriptor, meta.uid or self._uid, meta.gid or self._gid)
        os.fchmod(descriptor, meta.mode)
        os.utime(descriptor, ns=(meta.mtime_ns, meta.mtime_ns))


@dataclass(slots=True)
class ExportReport:
    """Paths, relative to the destination.

    Attributes:
        written: files and links that were made or replaced.
        blocked: not written, because a directory or a link of the destination is in the way.
        escaping: symbolic links left out, because they point out of the tree.
        run_by_host: those of `written` that programs on the host run or obey (.git/hooks, .envrc, ...).
    """

    written: list[bytes] = field(default_factory=list[bytes])
    blocked: list[bytes] = field(default_factory=list[bytes])
    escaping: list[bytes] = field(default_factory=list[bytes])

    @property
    def run_by_host(self) -> list[bytes]:
        return [path for path in self.written if any(part in b"/" + path for part in _RUN_BY_HOST)]


def export(root: bytes, destination: Path, objects: Objects) -> ExportReport:
    """Lay the tree over an existing directory: files are replaced one by one and whole; nothing is removed.

    Hard links become separate files; owners and extended attributes stay behind. A file that has these bytes
    already is left alone.

    Raises:
        Damaged: snapshot_damaged, snapshot_object_missing.
        MachineUnfit: no_space, storage_failed.
    """
    report = ExportReport()
    with storage_errors(f"export workspace to {destination}"), open_root(destination) as descriptor:
        _Laying(objects, report).directory(descriptor, root, b"", 0)
    return report


class _Laying:
    def __init__(self, objects: Objects, report: ExportReport) -> None:
        self._objects = objects
        self._report = report

    def directory(self, descriptor: int, digest: bytes, path: bytes, depth: int) -> None:
        for entry in entries_ahead(digest, self._objects):
            name = path + entry.name
            try:
                if entry.kind == DIRECTORY:
                    self._subdirectory(descriptor, entry, name, depth)
                elif entry.kind == FILE:
                    self._file(descriptor, entry, name)
                else:
                    self._symlink(descriptor, entry, name, depth)
            except _IN_THE_WAY:
                self._report.blocked.append(name)

    def _subdirectory(self, parent: int, entry: Entry, path: bytes, depth: int) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(entry.name, 0o700, dir_fd=parent)
        with open_directory(entry.name, parent) as descriptor:
            self.directory(descriptor, entry.digest, path + b"/", depth + 1)

    def _file(self, parent: int, entry: Entry, path: bytes) -> None:
        if self._is_there(parent, entry):
            return
        with _replacing(entry.name, parent) as temporary, create_file(temporary, parent) as descriptor:
            write_content(descriptor, entry.content, entry.size, self._objects)
            os.fchmod(descriptor, entry.meta.mode & 0o777)
            os.utime(descriptor, ns=(entry.meta.mtime_ns, entry.meta.mtime_ns))
        self._report.written.append(path)

    def _is_there(self, parent: int, entry: Entry) -> bool:
        try:
            status = os.stat(entry.name, dir_fd=parent, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode) or status.st_size != entry.size:
                return False
            if stat.S_IMODE(status.st_mode) != entry.meta.mode & 0o777:
                return False
            with open_file(entry.name, parent, mode=stat.S_IMODE(status.st_mode)) as descriptor:
                return holds_content(descriptor, entry.content, entry.size, self._objects)
        except OSError:
            return False

    def _symlink(self, parent: int, entry: Entry, path: bytes, depth: int) -> None:
        if not stays_inside(entry.target, depth):
            self._report.escaping.append(path)
            return
        with contextlib.suppress(OSError):
            if os.readlink(entry.name, dir_fd=parent) == entry.target:
                return
        with _replacing(entry.name, parent) as temporary:
            os.symlink(entry.target, temporary, dir_fd=parent)
        self._report.written.append(path)


_IN_THE_WAY = (IsADirectoryError, NotADirectoryError, FileExistsError)


@contextlib.contextmanager
def _replacing(name: bytes, parent: int) -> Generator[bytes]:
    """A temporary name that takes the place of `name` at the end; a link there is replaced, not followed."""
    temporary = b".torpor-" + secrets.token_hex(8).encode()
    try:
        yield temporary
        os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=parent)
        raise


def stays_inside(target: bytes, depth: int) -> bool:
    """Relative, and its `..` all lead and number no more than the link's depth.

    A `..` behind a name is refused, because that name may be a link: what it leads out of is not known from
    the text.
    """
    if target.startswith(b"/"):
        return False
    parts = [part for part in target.split(b"/") if part not in (b"", b".")]
    ups = next((at for at, part in enumerate(parts) if part != b".."), len(parts))
    return ups <= depth and b".." not in parts[ups:]
