"""Files that are there whole or not at all: written under another name, synced, then given theirs.

For small files of Torpor's own outside of the store, whose objects backend.py writes. Private to this user (0600).
"""

import contextlib
import os
import secrets
from collections.abc import Generator
from pathlib import Path


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace the file, or make it. A crash leaves the old one or the new one; without `durable` perhaps neither."""
    with _written_beside(path, data, durable=durable) as temporary:
        temporary.rename(path)


def create_atomic(path: Path, data: bytes) -> bool:
    """Make the file, durable on return, unless there is one: then False."""
    with _written_beside(path, data, durable=True) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        return True


def sync_directory(directory: Path) -> None:
    """Make names durable that were given or taken in it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _written_beside(path: Path, data: bytes, *, durable: bool) -> Generator[Path]:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(descriptor)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        if durable:
            sync_directory(path.parent)
