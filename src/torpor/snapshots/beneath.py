"""File access below an open directory, one component at a time, that follows no symbolic link and blocks on
nothing.

All walks of a workspace go through here: what lies in one was made by a hostile program.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Generator, Iterator
from pathlib import Path

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_HOLE_BYTES = 4096
_READ_BYTES = 1 << 20
_ZEROS = memoryview(bytes(_READ_BYTES))


@contextlib.contextmanager
def open_root(directory: Path) -> Generator[int]:
    """Open the directory that a walk starts from; this path alone may lead through symbolic links."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_directory(name: bytes, parent: int, *, mode: int = 0o700) -> Generator[int]:
    """Open a directory for listing. `mode` is what it has now: without read and search it gets them for the
    while.
    """
    with _made_readable(name, parent, mode, stat.S_IRUSR | stat.S_IXUSR):
        descriptor = os.open(name, _READ | os.O_DIRECTORY, dir_fd=parent)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def open_file(name: bytes, parent: int, *, mode: int = 0o600) -> Generator[int]:
    """Open a regular file for reading; OSError (ENXIO) when it is something else by now."""
    with _made_readable(name, parent, mode, stat.S_IRUSR):
        descriptor = os.open(name, _READ, dir_fd=parent)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
            yield descriptor
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def create_file(name: bytes, parent: int) -> Generator[int]:
    """Create a file that must not exist."""
    descriptor = os.open(name, _CREATE, 0o600, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _made_readable(name: bytes, parent: int, mode: int, needed: int) -> Generator[None]:
    """Lend the owner the permission that the agent took from itself (chmod 000); root does not need it."""
    if mode & needed == needed or os.geteuid() == 0:
        yield
        return
    anchor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if stat.S_ISLNK(os.fstat(anchor).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        path = f"/proc/self/fd/{anchor}"
        os.chmod(path, mode | needed)  # noqa: PTH101 - the path is a descriptor
        try:
            yield
        finally:
            os.chmod(path, mode)  # noqa: PTH101
    finally:
        os.close(anchor)


def data_extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what is not a hole to the file system, ascending, up to `size`."""
    at = 0
    while at < size:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA)
            end = min(size, os.lseek(descriptor, at, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:  # Only a hole is left.
                return
            raise
        if at < end:
            yield at, end
        at = end


def all_zeros(data: bytes) -> bool:
    """Whether there is no other byte in `data`, which has at most a mebibyte."""
    return data.startswith(_ZEROS[: len(data)])


def is_zeros(descriptor: int, start: int, end: int) -> bool:
    """Whether a part of a file is zeros or holes."""
    while start < end:
        try:
            start = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return True
            raise
        piece = os.pread(descriptor, max(0, min(_READ_BYTES, end - start)), start)
        if not all_zeros(piece):
            return False
        if not piece:
            return True
        start += len(piece)
    return True


def write_sparsely(descriptor: int, data: bytes, offset: int) -> None:
    """Write bytes into a new file, leaving out pages of zeros: a sparse file must not grow by being restored."""
    view = memoryview(data)
    start = at = 0
    while at < len(data):
        end = min(at + _HOLE_BYTES - (offset + at) % _HOLE_BYTES, len(data))
        # A part of a page too: the other part may be zeros of another piece.
        if data.startswith(_ZEROS[: end - at], at):
            write_at(descriptor, view[start:at], offset + start)
            start = end
        at = end
    write_at(descriptor, view[start:], offset + start)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written
