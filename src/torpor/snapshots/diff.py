"""What changed between two stored trees, or between a stored tree and a directory on disk.

Compared are kind, content, mode and link target; times, owners, hard links and extended attributes are not
changes.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torpor.snapshots.backend import storage_errors
from torpor.snapshots.beneath import open_directory, open_file, open_root
from torpor.snapshots.chunks import holds_content
from torpor.snapshots.objects import Objects
from torpor.snapshots.tree import DIRECTORY, FILE, LINK, MODE_KEPT, Entry, decode_directory


@dataclass(frozen=True, slots=True)
class Change:
    """`path` is relative to the workspace; an added or removed directory is listed, and so is all that is
    below it.
    """

    path: bytes
    what: Literal["added", "removed", "changed"]


def diff_trees(before: bytes, after: bytes, objects_before: Objects, objects_after: Objects) -> list[Change]:
    """Changes from one stored tree to another, sorted by path within each directory."""
    return list(_diff(before, after, objects_before, objects_after, b""))


def _diff(
    before: bytes, after: bytes, objects_before: Objects, objects_after: Objects, path: bytes
) -> Iterator[Change]:
    if before == after:
        return
    old = {entry.name: entry for entry in decode_directory(objects_before.get(before))}
    new = {entry.name: entry for entry in decode_directory(objects_after.get(after))}
    for name in sorted(old.keys() | new.keys()):
        one, other = old.get(name), new.get(name)
        if one and other and one.kind == other.kind:
            if not _is_same(one, other):
                yield Change(path + name, "changed")
            if one.kind == DIRECTORY:
                yield from _diff(one.digest, other.digest, objects_before, objects_after, path + name + b"/")
            continue
        if one:
            yield from _all(one, objects_before, path, "removed")
        if other:
            yield from _all(other, objects_after, path, "added")


def _is_same(one: Entry, other: Entry) -> bool:
    return (one.meta.mode, one.size, one.content, one.target) == (
        other.meta.mode,
        other.size,
        other.content,
        other.target,
    )


def _all(entry: Entry, objects: Objects, path: bytes, what: Literal["added", "removed"]) -> Iterator[Change]:
    yield Change(path + entry.name, what)
    if entry.kind == DIRECTORY:
        for below in decode_directory(objects.get(entry.digest)):
            yield from _all(below, objects, path + entry.name + b"/", what)


def diff_directory(root: bytes, directory: Path, objects: Objects) -> list[Change]:
    """Changes from a stored tree to what a directory holds now; what a tree can't hold (sockets, ...) is
    passed over.

    Raises:
        MachineUnfit: storage_failed.
    """
    with storage_errors(f"compare directory {directory}"), open_root(directory) as descriptor:
        return list(_against(root, descriptor, objects, b""))


def _against(digest: bytes | None, descriptor: int, objects: Objects, path: bytes) -> Iterator[Change]:
    """`digest` is None below a directory that was added."""
    old = {entry.name: entry for entry in decode_directory(objects.get(digest))} if digest else {}
    with os.scandir(descriptor) as listing:
        present = {os.fsencode(entry.name): entry.stat(follow_symlinks=False) for entry in listing}
    new = {name: status for name, status in present.items() if stat.S_IFMT(status.st_mode) in _KINDS}
    for name in sorted(old.keys() | new.keys()):
        entry, status = old.get(name), new.get(name)
        matches = entry and status and _KINDS[stat.S_IFMT(status.st_mode)] == entry.kind
        if entry and not matches:
            yield from _all(entry, objects, path, "removed")
        if not status:
            continue
        if not matches:
            yield Change(path + name, "added")
        elif entry and not _is_on_disk(entry, status, descriptor, objects):
            yield Change(path + name, "changed")
        if stat.S_ISDIR(status.st_mode):
            with open_directory(name, descriptor, mode=stat.S_IMODE(status.st_mode)) as below:
                yield from _against(entry.digest if entry and matches else None, below, objects, path + name + b"/")


_KINDS = {stat.S_IFREG: FILE, stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: LINK}


def _is_on_disk(entry: Entry, status: os.stat_result, parent: int, objects: Objects) -> bool:
    if entry.kind == LINK:
        return os.readlink(entry.name, dir_fd=parent) == entry.target
    if entry.meta.mode != status.st_mode & MODE_KEPT:
        return False
    if entry.kind == DIRECTORY:
        return True
    if entry.size != status.st_size:
        return False
    with open_file(entry.name, parent, mode=stat.S_IMODE(status.st_mode)) as descriptor:
        return holds_content(descriptor, entry.content, entry.size, objects)
