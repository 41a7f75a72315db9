"""The workspace as a tree of content-addressed directory objects: its nouns and the bytes of a directory.

Owns the directory object (docs/snapshot-format.md). Names are bytes: a workspace need not be UTF-8. Set-user-
id and set-group-id never enter a tree.
"""

import itertools
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torpor.core.errors import Damaged
from torpor.core.ids import SnapshotId
from torpor.snapshots.content_ids import OBJECT_ID_BYTES
from torpor.snapshots.objects import Content, content_bytes

MODE_KEPT = 0o1777
DEPTH_MAX = 256
_ENTRY = struct.Struct("<cHIIqHI")
_FILE = struct.Struct("<QQ")
_TARGET = struct.Struct("<H")


@dataclass(frozen=True, slots=True)
class Meta:
    """`uid` and `gid` are 0 for the owner of the workspace's root directory."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int


ROOT_META = Meta(0o700, 0, 0, 0)
"""Of the workspace's root directory, whose mode, owner and times are its incarnation's."""


class Stamp(NamedTuple):
    """What the file system says of a file; equal stamps, and a ctime that is old enough, mean equal bytes.

    A tuple, because a capture compares one for each file while the agent stands still.
    """

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @staticmethod
    def of(status: os.stat_result) -> "Stamp":
        return Stamp(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileNode:
    """`link` is equal (and not 0) for the names of one file; `attributes` are encoded."""

    meta: Meta
    stamp: Stamp
    link: int
    content: Content
    attributes: bytes = b""

    @property
    def size(self) -> int:
        return self.stamp.size


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkNode:
    meta: Meta
    stamp: Stamp
    target: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DirNode:
    """A stored directory.

    Attributes:
        left_out: names in it that a tree can't hold.
        inodes, directories: of its own names, so that a file known by its inode is found quickly.
        entries: names in it and below, those left out too; `file_bytes` is their files' bytes.
    """

    meta: Meta
    stamp: Stamp
    attributes: bytes = b""
    children: "Mapping[bytes, Node]" = field(repr=False)
    left_out: frozenset[bytes] = frozenset()
    inodes: frozenset[int] = field(repr=False)
    directories: "tuple[tuple[bytes, DirNode], ...]" = field(repr=False)
    digest: bytes
    entries: int
    file_bytes: int


Node = FileNode | LinkNode | DirNode


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeIndex:
    """What a workspace directory held at the instant `cut_wall_ns`, as `snapshot_id` stores it: the next
    capture reads only what changed since.

    Attributes:
        generation: the watch's number of that instant; 0 when nothing was watched.
    """

    root: DirNode
    cut_wall_ns: int
    snapshot_id: SnapshotId
    generation: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One decoded entry of a directory object. `content` for files, `digest` for directories, `target` for
    links.
    """

    name: bytes
    kind: bytes
    meta: Meta
    attributes: bytes = b""
    size: int = 0
    link: int = 0
    content: bytes = b""
    digest: bytes = b""
    target: bytes = b""


FILE, DIRECTORY, LINK = b"f", b"d", b"l"


def encode_directory(children: Mapping[bytes, Node]) -> bytes:
    pieces: list[bytes] = []
    for name in sorted(children):
        node = children[name]
        attributes = b"" if isinstance(node, LinkNode) else node.attributes
        if isinstance(node, FileNode):
            kind, rest = FILE, _FILE.pack(node.size, node.link) + node.content.encoded
        elif isinstance(node, DirNode):
            kind, rest = DIRECTORY, node.digest
        else:
            kind, rest = LINK, _TARGET.pack(len(node.target)) + node.target
        meta = node.meta
        head = _ENTRY.pack(kind, meta.mode, meta.uid, meta.gid, meta.mtime_ns, len(name), len(attributes))
        pieces += (head, name, attributes, rest)
    return b"".join(pieces)


def decode_directory(data: bytes) -> list[Entry]:
    """Raises Damaged: snapshot_damaged, also for names that could lead out of the directory."""
    try:
        entries = list(_entries(data))
    except (struct.error, IndexError) as error:
        raise _bad_directory("it is cut short") from error
    for before, after in itertools.pairwise(entries):
        if before.name >= after.name:
            raise _bad_directory("its names are out of order")
    return entries


def _entries(data: bytes) -> Iterator[Entry]:
    at: int = 0
    while at < len(data):
        kind, mode, uid, gid, mtime_ns, name_bytes, attribute_bytes = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size
        name = data[at : at + name_bytes]
        at += name_bytes
        attributes = data[at : at + attribute_bytes]
        at += attribute_bytes
        if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
            raise _bad_directory(f"the name {name!r} is not allowed")
        meta = Meta(mode & MODE_KEPT, uid, gid, mtime_ns)
        if kind == FILE:
            size, link = _FILE.unpack_from(data, at)
            at += _FILE.size
            length = content_bytes(data[at])
            content = data[at : at + length]
            yield Entry(name=name, kind=kind, meta=meta, attributes=attributes, size=size, link=link, content=content)
        elif kind == DIRECTORY:
            length = OBJECT_ID_BYTES
            digest = data[at : at + length]
            yield Entry(name=name, kind=kind, meta=meta, attributes=attributes, digest=digest)
        elif kind == LINK:
            (length,) = _TARGET.unpack_from(data, at)
            at += _TARGET.size
            yield Entry(name=name, kind=kind, meta=meta, target=data[at : at + length])
        else:
            raise _bad_directory(f"the kind {kind!r} is unknown")
        at += length


def _bad_directory(reason: str) -> Damaged:
    return Damaged("snapshot_damaged", f"cannot read a directory of the workspace: {reason}")


def directory_node(
    meta: Meta,
    stamp: Stamp,
    children: Mapping[bytes, Node],
    digest: bytes,
    *,
    attributes: bytes = b"",
    left_out: frozenset[bytes] = frozenset(),
) -> DirNode:
    """Build a DirNode with its sums."""
    directories = tuple((name, node) for name, node in children.items() if isinstance(node, DirNode))
    own_bytes = sum(node.size for node in children.values() if isinstance(node, FileNode))
    return DirNode(
        meta=meta,
        stamp=stamp,
        attributes=attributes,
        children=children,
        left_out=left_out,
        inodes=frozenset(node.stamp.inode for node in children.values()),
        directories=directories,
        digest=digest,
        entries=len(children) + len(left_out) + sum(node.entries for _, node in directories),
        file_bytes=own_bytes + sum(node.file_bytes for _, node in directories),
    )


def directories_below(node: DirNode, path: bytes = b"") -> Iterator[tuple[bytes, DirNode]]:
    """(path, node) of the directory and all below; the root's path is empty, all others end with a slash."""
    yield path, node
    for name, child in node.directories:
        yield from directories_below(child, path + name + b"/")


def objects_below(node: DirNode) -> Iterator[bytes]:
    """Digests of all objects that the directory needs, its own first; some more than once."""
    yield node.digest
    for child in node.children.values():
        if isinstance(child, FileNode):
            yield from child.content.objects
        elif isinstance(child, DirNode):
            yield from objects_below(child)
