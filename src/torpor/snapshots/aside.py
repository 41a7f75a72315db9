"""Where the bytes of changed files go while the agent stands still: memory, a copy, or a clone of the file.

A copy costs its bytes, and goes to the staging directory, which is memory. A clone (FICLONE) costs next to
nothing whatever the file's size, but has to be on the file system that the file is on.
"""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from torpor.snapshots.beneath import create_file, data_extents, open_root

_IN_MEMORY_FILE_BYTES_MAX = 128 * 1024
_IN_MEMORY_BYTES_MAX = 64 * 1024 * 1024
# Cloning writes what is dirty in the file to the disk first; a copy of a small one is quicker than that.
_CLONE_BYTES_MIN = 4 * 1024 * 1024
_FICLONE = 0x40049409
_NO_CLONES = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM)


class Aside:
    """Takes the bytes of open files as they are now."""

    def __init__(self, staging: Path, clones: Path | None) -> None:
        """`clones` is made when it is needed; None where the file system is known to have none."""
        self._staging = staging
        self._clones = clones
        self._files = 0
        self._in_memory_bytes = 0
        self.staged_bytes = 0
        self.cloned_bytes = 0

    def take(self, descriptor: int, size: int) -> bytes | Path:
        """The first `size` bytes of a file, or the path of a file of our own with them.

        Raises:
            OSError
        """
        if size <= _IN_MEMORY_FILE_BYTES_MAX and self._in_memory_bytes + size <= _IN_MEMORY_BYTES_MAX:
            self._in_memory_bytes += size
            self.staged_bytes += size
            return os.pread(descriptor, size, 0).ljust(size, b"\0")
        self._files += 1
        name = b"%d" % self._files
        if self._clones and size >= _CLONE_BYTES_MIN and self._clone(descriptor, self._clones, name):
            self.cloned_bytes += size
            return self._clones / os.fsdecode(name)
        with open_root(self._staging) as directory, create_file(name, directory) as copy:
            _copy_data(descriptor, copy, size)
        self.staged_bytes += size
        return self._staging / os.fsdecode(name)

    def _clone(self, descriptor: int, clones: Path, name: bytes) -> bool:
        clones.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open_root(clones) as directory:
            try:
                with create_file(name, directory) as clone:
                    fcntl.ioctl(clone, _FICLONE, descriptor)
            except OSError as error:
                os.unlink(name, dir_fd=directory)
                if error.errno not in _NO_CLONES:
                    raise
                self._clones = None
        if self._clones is None:
            with contextlib.suppress(OSError):
                clones.rmdir()
        return self._clones is not None


def _copy_data(source: int, copy: int, size: int) -> None:
    """Copy what is not a hole, in the kernel."""
    os.ftruncate(copy, size)
    for start, end in data_extents(source, size):
        at = start
        os.lseek(copy, at, os.SEEK_SET)
        while at < end:
            sent = os.sendfile(copy, source, at, end - at)
            if sent == 0:
                return
            at += sent
