"""What a disk may hold after a power cut, rebuilt from the record that native/powercut wrote.

Of everything that was not synced any part may have reached the disk and any may not: writes page by page, sizes, names.
A file's sync covers its bytes and size; names are covered by a sync of their directory. A rename is one change: it has
happened or it has not. File systems promise more than this, so what survives here survives there.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path, PurePosixPath

PAGE_BYTES = 4096
_HEADER = struct.Struct("<IBQQIII")
_LENGTH_BYTES = 4


class Kind(StrEnum):
    CREATE = "C"
    WRITE = "W"
    RESIZE = "T"
    SYNC = "S"
    RENAME = "R"
    UNLINK = "U"
    LINK = "L"
    MKDIR = "M"
    RMDIR = "D"
    UNSEEN = "X"
    """A file was mapped for writing: what went that way is not in the record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One change, in the order in which they happened. `offset` is the size, for RESIZE."""

    kind: Kind
    inode: int
    offset: int
    path: str
    other: str
    data: bytes


@dataclass(slots=True)
class _File:
    """A file or directory that once had a name; `writes` are its own, with whether they were synced."""

    is_directory: bool
    writes: list[Operation] = field(default_factory=list[Operation])
    synced: int = 0
    is_unseen: bool = False


@dataclass(slots=True, kw_only=True)
class _Naming:
    """One change of names: each edit gives a name in a directory a file, or takes it. Synced with `directory`."""

    directory: _File
    edits: list[tuple[_File, str, _File | None]]
    is_synced: bool = False


def read_record(path: Path) -> list[Operation]:
    """The operations of a record, oldest first; a last one that was cut off is left out."""
    data = path.read_bytes()
    found: list[Operation] = []
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, inode, offset, path_bytes, other_bytes, data_bytes = _HEADER.unpack_from(data, at)
        start = at + _HEADER.size
        at += _LENGTH_BYTES + length
        if at > len(data):
            break
        other = start + path_bytes
        found.append(
            Operation(
                kind=Kind(chr(kind)),
                inode=inode,
                offset=offset,
                path=data[start:other].decode(),
                other=data[other : other + other_bytes].decode(),
                data=data[other + other_bytes : other + other_bytes + data_bytes],
            )
        )
    return found


def rebuild(
    operations: Sequence[Operation],
    root: Path,
    target: Path,
    reached: Callable[[], bool],
    *,
    unseen_suffix: str = "-shm",
) -> None:
    """Make `target` what `root` may be when the power fails right after the last of `operations`.

    Args:
        operations: a beginning of the record; `root` was empty before it.
        reached: asked for every piece that was not synced, whether it reached the disk all the same.
        unseen_suffix: of files that may be left out because programs make them anew.

    Raises:
        ValueError: the record lacks what went into a file.
    """
    machine = _Machine(root)
    for operation in operations:
        machine.do(operation)
    _materialize(machine.root, machine.names_on_disk(reached), target, reached, unseen_suffix)


class _Machine:
    """The files as the running system sees them, and which changes of them are synced."""

    def __init__(self, root: Path) -> None:
        self.root = _File(is_directory=True)
        self._prefix = PurePosixPath(root)
        self._names: dict[tuple[int, str], _File] = {}
        self._by_inode: dict[int, _File] = {}
        self._namings: list[_Naming] = []

    def do(self, operation: Operation) -> None:
        match operation.kind:
            case Kind.CREATE | Kind.MKDIR:
                file = _File(is_directory=operation.kind is Kind.MKDIR)
                self._by_inode[operation.inode] = file
                self._rename([(operation.path, file)])
            case Kind.WRITE | Kind.RESIZE:
                self._by_inode[operation.inode].writes.append(operation)
            case Kind.SYNC:
                self._sync(self._by_inode.get(operation.inode) or self._at(operation.path))
            case Kind.RENAME:
                self._rename([(operation.other, self._at(operation.path)), (operation.path, None)])
            case Kind.LINK:
                self._rename([(operation.other, self._at(operation.path))])
            case Kind.UNLINK | Kind.RMDIR:
                self._rename([(operation.path, None)])
            case Kind.UNSEEN:
                self._by_inode[operation.inode].is_unseen = True

    def names_on_disk(self, reached: Callable[[], bool]) -> dict[int, dict[str, _File]]:
        """The names in each directory (by its identity) after the cut."""
        found: dict[int, dict[str, _File]] = {}
        for naming in self._namings:
            if naming.is_synced or reached():
                for directory, name, file in naming.edits:
                    entries = found.setdefault(id(directory), {})
                    entries.pop(name, None)
                    if file is not None:
                        entries[name] = file
        return found

    def _sync(self, file: _File) -> None:
        file.synced = len(file.writes)
        for naming in self._namings:
            naming.is_synced = naming.is_synced or naming.directory is file

    def _rename(self, changes: list[tuple[str, _File | None]]) -> None:
        """Give names to files; the directory of the first is the one whose sync makes the change durable."""
        edits: list[tuple[_File, str, _File | None]] = []
        for path, file in changes:
            name = PurePosixPath(path)
            directory = self._at(str(name.parent))
            edits.append((directory, name.name, file))
            self._names.pop((id(directory), name.name), None)
            if file is not None:
                self._names[id(directory), name.name] = file
        self._namings.append(_Naming(directory=edits[0][0], edits=edits))

    def _at(self, path: str) -> _File:
        file = self.root
        for name in PurePosixPath(path).relative_to(self._prefix).parts:
            file = self._names[id(file), name]
        return file


def _materialize(
    directory: _File,
    names: dict[int, dict[str, _File]],
    target: Path,
    reached: Callable[[], bool],
    unseen_suffix: str,
) -> None:
    target.mkdir(parents=True)
    for name, file in names.get(id(directory), {}).items():
        if file.is_directory:
            _materialize(file, names, target / name, reached, unseen_suffix)
        elif not file.is_unseen:
            (target / name).write_bytes(_content(file, reached))
        elif not name.endswith(unseen_suffix):
            raise ValueError(f"the record lacks what was stored into {name} through a mapping")


def _content(file: _File, reached: Callable[[], bool]) -> bytes:
    content = bytearray()
    for index, write in enumerate(file.writes):
        is_synced = index < file.synced
        if write.kind is Kind.RESIZE:
            if is_synced or reached():
                _resize(content, write.offset)
            continue
        for start, end in _pages(write.offset, len(write.data)):
            if is_synced or reached():
                _resize(content, max(len(content), write.offset + start))
                content[write.offset + start : write.offset + end] = write.data[start:end]
    return bytes(content)


def _resize(content: bytearray, size: int) -> None:
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


def _pages(offset: int, size: int) -> list[tuple[int, int]]:
    """A write in parts that lie in one page each, relative to its start."""
    bounds = [0, *range(PAGE_BYTES - offset % PAGE_BYTES, size, PAGE_BYTES), size]
    return list(pairwise(bounds))
