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

from torpor.snapshots.objects import BLOCK_BYTES

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_HOLE_BYTES = 4096
_ZEROS = bytes(_HOLE_BYTES)


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


def read_blocks(descriptor: int, size: int) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each block that is not wholly a hole."""
    at = 0
    while at < size:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # Only a hole is left.
                return
            raise
        number = at // BLOCK_BYTES
        at = number * BLOCK_BYTES
        block = os.pread(descriptor, min(BLOCK_BYTES, size - at), at)
        if block:
            yield number, block
        at += BLOCK_BYTES


def write_block(descriptor: int, number: int, block: bytes) -> None:
    """Write one block, leaving out its zero pages: a sparse file must not grow by being restored."""
    start = number * BLOCK_BYTES
    if block.find(_ZEROS) < 0:
        write_at(descriptor, block, start)
        return
    for at in range(0, len(block), _HOLE_BYTES):
        piece = block[at : at + _HOLE_BYTES]
        if piece.count(0) != len(piece):
            write_at(descriptor, piece, start + at)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written
