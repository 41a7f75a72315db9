"""Blocks of an object store's packs on this machine's disk, so that a restore fetches them once. Bounded.

Owns a directory that every process of a TORPOR_HOME reads and writes; what was used least lately goes first. It is a
backend in front of another. Only ranges of packs come from here: whole objects, which is what a verification reads, and
whether an object is there, are always asked of the store. What is kept is as sealed as there.

Every block carries its digest: one that a crash tore, or that somebody changed, is fetched again. So nothing is synced,
and what this disk refuses is never a caller's failure.
"""

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from torpor.snapshots.backend import Backend, Entry
from torpor.snapshots.lease import Leases

logger = logging.getLogger(__name__)

BLOCK_BYTES = 512 * 1024
_DIGEST_BYTES = 32
_FILLED_AGAIN = 0.9
"""What is left of the limit after a clean-up, so that not every block needs one."""


class PackCache:
    """See the module."""

    def __init__(self, backend: Backend, directory: Path, *, bytes_max: int) -> None:
        self._backend = backend
        self._directory = directory
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._held_bytes: int | None = None

    @property
    def name(self) -> str:
        return self._backend.name

    def ready(self) -> None:
        self._backend.ready()

    def put(self, key: str, data: bytes) -> bool:
        is_new = self._backend.put(key, data)
        if is_new and key.startswith("packs/"):
            self._keep(key, 0, data)
        return is_new

    def get(self, key: str) -> bytes:
        return self._backend.get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if length <= 0 or not key.startswith("packs/"):
            return self._backend.get_range(key, start, length)
        numbers = range(start // BLOCK_BYTES, (start + length - 1) // BLOCK_BYTES + 1)
        blocks = {number: block for number in numbers if (block := self._read(key, number)) is not None}
        for first, count in _runs(number for number in numbers if number not in blocks):
            data = self._backend.get_range(key, first * BLOCK_BYTES, count * BLOCK_BYTES)
            self._keep(key, first, data)
            for number in range(first, first + count):
                at = (number - first) * BLOCK_BYTES
                blocks[number] = data[at : at + BLOCK_BYTES]
        skipped = start - numbers[0] * BLOCK_BYTES
        return b"".join(blocks[number] for number in numbers)[skipped : skipped + length]

    def exists(self, key: str) -> bool:
        return self._backend.exists(key)

    def absent(self, keys: Iterable[str]) -> set[str]:
        return self._backend.absent(keys)

    def delete(self, key: str) -> None:
        self._backend.delete(key)
        self._drop(key)

    def delete_many(self, keys: Iterable[str]) -> None:
        gone = list(keys)
        self._backend.delete_many(gone)
        for key in gone:
            self._drop(key)

    def list(self, prefix: str) -> list[str]:
        return self._backend.list(prefix)

    def entries(self, prefix: str) -> Sequence[Entry]:
        return self._backend.entries(prefix)

    def now_ns(self) -> int:
        return self._backend.now_ns()

    @property
    def leases(self) -> Leases:
        return self._backend.leases

    def close(self) -> None:
        self._backend.close()

    def _path(self, key: str, number: int) -> Path:
        name = key.removeprefix("packs/")
        return self._directory / name[-2:] / f"{name}-{number}"

    def _read(self, key: str, number: int) -> bytes | None:
        """A block that is here and whole; it was used now."""
        path = self._path(key, number)
        try:
            with path.open("rb") as file:
                os.utime(file.fileno())
                digest, block = file.read(_DIGEST_BYTES), file.read()
        except OSError:
            return None
        if sha256(block).digest() == digest:
            return block
        logger.warning("a block of %s in the cache of packs is not what was written: it is fetched again", key)
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def _keep(self, key: str, first: int, data: bytes) -> None:
        """Write the blocks of `data`, which begins with block `first`. A pack's last block is as long as it is."""
        added = 0
        try:
            for at in range(0, len(data), BLOCK_BYTES):
                block = data[at : at + BLOCK_BYTES]
                self._write(self._path(key, first + at // BLOCK_BYTES), block)
                added += _DIGEST_BYTES + len(block)
        except OSError as error:
            logger.warning("the cache of packs takes nothing: %s", error)
        self._make_room(added)

    def _write(self, path: Path, block: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = path.with_name(f"partial-{secrets.token_hex(8)}")
        try:
            with partial.open("xb") as file:
                partial.chmod(0o600)
                file.write(sha256(block).digest())
                file.write(block)
            partial.rename(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def _drop(self, key: str) -> None:
        if key.startswith("packs/"):
            first = self._path(key, 0)
            for path in first.parent.glob(f"{key.removeprefix('packs/')}-*"):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _make_room(self, added: int) -> None:
        """Count what was added; beyond the limit, look at what is really there, for other processes write too."""
        with self._lock:
            if self._held_bytes is not None:
                self._held_bytes += added
                if self._held_bytes <= self._bytes_max:
                    return
            found = sorted(self._files())
            held = sum(size for _, size, _ in found)
            limit = self._bytes_max * _FILLED_AGAIN if held > self._bytes_max else held
            for _, size, path in found:
                if held <= limit:
                    break
                with contextlib.suppress(OSError):
                    path.unlink()
                    held -= size
            self._held_bytes = held

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """When each was used, its size, its path; also what dead writers left half written."""
        for path in self._directory.glob("*/*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Neighbours together: first number and how many."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and sum(runs[-1]) == number:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs
