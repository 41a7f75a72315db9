"""A file or a directory that a worker sends out of a sandbox, written to this machine; one of this machine, sent in.

What comes is hostile. It is made below a new directory entry of our own, one path component at a time, following no
link, and gets its name when it is whole: what is there already is never written to, and a copy that ends early leaves
nothing behind. Links that lead out of the copy, and setuid bits, are left out.
"""

import contextlib
import os
import secrets
import shutil
import stat
import struct
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torpor.core.errors import Conflict, InvalidInput, MachineUnfit
from torpor.sandbox.frames import PAYLOAD_BYTES_MAX, violation
from torpor.sandbox.workers import Record, encode
from torpor.snapshots.beneath import create_file, open_directory, open_file, open_root
from torpor.snapshots.materialize import stays_inside

_ENTRY = struct.Struct("<IqQ")
_SPARE_BYTES = 64 << 20
"""Left free on the disk that is copied to."""
_LOOK_BYTES = 32 << 20


@dataclass(slots=True)
class Copied:
    """What a copy came to.

    Attributes:
        left_out: paths within the copy, each with the reason.
    """

    files: int = 0
    data_bytes: int = 0
    left_out: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


class Incoming:
    """A copy on its way here. Use it as a context: without `finish` nothing is left."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._stage = b".torpor-" + secrets.token_hex(8).encode()
        self._root: int | None = None
        self._file: tuple[int, Entry] | None = None
        self._begun = False
        self._unlooked_bytes = _LOOK_BYTES
        self.copied = Copied()

    def __enter__(self) -> "Incoming":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (self._file[0] if self._file else None, self._root):
            if descriptor is not None:
                os.close(descriptor)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            shutil.rmtree(self._stage, dir_fd=self._parent)
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(self._stage, dir_fd=self._parent)
        os.close(self._parent)

    def take(self, record: Record) -> None:
        """Take one record.

        Raises:
            SandboxFailed: ("link_protocol") it makes no sense here, or names a path that is none.
            MachineUnfit: ("no_space") the disk would be full.
        """
        match record.kind:
            case b"D" | b"A" | b"L":
                self._make(record.kind, _parse(record.payload))
            case b"N":
                entry = _parse(record.payload)
                self.copied.left_out.append((_shown(entry.path), _shown(entry.target)))
            case b"B":
                self._write(record.payload)
            case b"Z":
                self._end_file()
            case _:
                pass

    def finish(self) -> Copied:
        """Give the copy its name.

        Raises:
            Conflict: `copy_in_the_way`: a directory of that name is there.
        """
        if self._file is not None or not self._begun:
            raise violation("its copy ends before it is whole")
        try:
            os.rename(self._stage, os.fsencode(self._target.name), src_dir_fd=self._parent, dst_dir_fd=self._parent)
        except OSError as error:
            raise in_the_way(self._target) from error
        return self.copied

    def _make(self, kind: bytes, entry: "Entry") -> None:
        if self._file is not None or (not entry.path) == self._begun or (not entry.path and kind == b"L"):
            raise violation("its copy has an entry where none can be")
        if not entry.path:
            self._begun = True
            self._make_at(kind, entry, self._stage, self._parent, ())
            return
        parts = entry.path.split(b"/")
        if self._root is None or any(part in (b"", b".", b"..") for part in parts):
            raise violation("its copy has a path that is none")
        with contextlib.ExitStack() as opened:
            parent = self._root
            for part in parts[:-1]:
                try:
                    parent = opened.enter_context(open_directory(part, parent))
                except OSError as error:
                    raise violation("its copy has an entry in what is no directory of it") from error
            self._make_at(kind, entry, parts[-1], parent, parts)

    def _make_at(self, kind: bytes, entry: "Entry", name: bytes, parent: int, parts: Sequence[bytes]) -> None:
        try:
            if kind == b"D":
                os.mkdir(name, entry.mode & 0o777 | stat.S_IRWXU, dir_fd=parent)
                if not parts:
                    self._root = os.open(
                        name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent
                    )
            elif kind == b"A":
                with create_file(name, parent) as descriptor:
                    self._file = os.dup(descriptor), entry
            elif stays_inside(entry.target, len(parts) - 1):
                os.symlink(entry.target, name, dir_fd=parent)
            else:
                self.copied.left_out.append((_shown(entry.path), "the link leads out of the copy"))
        except FileExistsError as error:
            raise violation("its copy names an entry twice") from error

    def _write(self, data: bytes) -> None:
        if self._file is None:
            raise violation("its copy has bytes of no file")
        self._unlooked_bytes += len(data)
        if self._unlooked_bytes >= _LOOK_BYTES:
            self._unlooked_bytes = 0
            if shutil.disk_usage(self._target.parent).free < _SPARE_BYTES + _LOOK_BYTES:
                raise MachineUnfit("no_space", f"cannot copy to {self._target}: the disk is almost full")
        view = memoryview(data)
        while view:
            view = view[os.write(self._file[0], view) :]
        self.copied.data_bytes += len(data)

    def _end_file(self) -> None:
        if self._file is None:
            raise violation("its copy ends a file that it has not begun")
        descriptor, entry = self._file
        self._file = None
        try:
            os.fchmod(descriptor, entry.mode & 0o777)
            os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(descriptor)
        self.copied.files += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry; `target` is a link's, or why it was left out."""

    mode: int
    mtime_ns: int
    path: bytes
    target: bytes


def place_of(local: Path, name: str) -> Path:
    """Where a copy goes: the path itself, or its name in the directory that the path is.

    Raises:
        InvalidInput: `copy_impossible`.
        Conflict: `copy_in_the_way`.
    """
    target = local / name if local.is_dir() else local
    if not target.parent.is_dir():
        raise InvalidInput("copy_impossible", f"cannot copy to {target}: there is no directory {target.parent}")
    if target.is_dir() and not target.is_symlink():
        raise in_the_way(target)
    return target


def in_the_way(target: Path) -> Conflict:
    hint = "Name another place, or remove it first."
    return Conflict("copy_in_the_way", f"cannot copy to {target}: there is something already", hint=hint)


def outgoing(source: Path, copied: Copied) -> Iterator[bytes]:
    """The records of a file or a directory of this machine; `copied` counts what was given so far.

    Raises:
        InvalidInput: `copy_impossible`.
    """
    try:
        if source.is_dir():
            with open_root(source) as descriptor:
                yield from _directory(descriptor, b"", copied)
        else:
            with open_root(source.parent) as parent:
                yield from _file(os.fsencode(source.resolve().name), parent, b"", copied)
    except OSError as error:
        raise InvalidInput("copy_impossible", f"cannot copy {source}: {error.strerror}") from error


def _directory(descriptor: int, path: bytes, copied: Copied) -> Generator[bytes]:
    yield _entry(b"D", os.fstat(descriptor), path)
    for name in sorted(os.fsencode(name) for name in os.listdir(descriptor)):
        below = path + b"/" + name if path else name
        status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            with open_directory(name, descriptor) as child:
                yield from _directory(child, below, copied)
        elif stat.S_ISREG(status.st_mode):
            yield from _file(name, descriptor, below, copied)
        elif stat.S_ISLNK(status.st_mode):
            yield _entry(b"L", status, below, os.readlink(name, dir_fd=descriptor))
        else:
            copied.left_out.append((_shown(below), "it is no file, directory or link"))


def _file(name: bytes, parent: int, path: bytes, copied: Copied) -> Generator[bytes]:
    with open_file(name, parent) as descriptor:
        yield _entry(b"A", os.fstat(descriptor), path)
        while data := os.read(descriptor, PAYLOAD_BYTES_MAX):
            copied.data_bytes += len(data)
            yield encode(b"B", data)
        copied.files += 1
        yield encode(b"Z")


def _entry(kind: bytes, status: os.stat_result, path: bytes, target: bytes = b"") -> bytes:
    head = _ENTRY.pack(stat.S_IMODE(status.st_mode) & 0o777, status.st_mtime_ns, status.st_size)
    return encode(kind, head + path + b"\0" + target)


def _parse(payload: bytes) -> Entry:
    path, separator, target = payload[_ENTRY.size :].partition(b"\0")
    if not separator or b"\0" in target:
        raise violation("its copy has an entry that is none")
    mode, mtime_ns, _ = _ENTRY.unpack_from(payload)
    return Entry(mode=mode, mtime_ns=mtime_ns, path=path, target=target)


def _shown(text: bytes) -> str:
    return text.decode("utf-8", "backslashreplace")
