"""Directories in memory for tests, where a sync costs nothing; those of runs that were killed go with the next run."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY = Path("/dev/shm")
_PREFIXES = ("collecting-", "verifying-")
_OLD_SECONDS = 3600
"""A younger one may be of a run that does not lock what it has, or has not yet."""


@contextmanager
def memory_directory(prefix: str = "collecting-") -> Iterator[Path]:
    """A directory that is gone afterwards; on disk where there is no /dev/shm."""
    assert prefix in _PREFIXES
    if MEMORY.is_dir():
        sweep(MEMORY)
    made = Path(tempfile.mkdtemp(prefix=prefix, dir=MEMORY if MEMORY.is_dir() else None))
    held = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield made
    finally:
        shutil.rmtree(made)
        os.close(held)


def sweep(memory: Path) -> None:
    """Remove the directories of dead runs: nobody holds their locks."""
    for left in (path for prefix in _PREFIXES for path in memory.glob(f"{prefix}*")):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime < _OLD_SECONDS:
                continue
            held = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(held)
