"""Where the store's objects live: named, immutable byte strings, created once, durable when `put` returns.

Owns the `Backend` protocol, the local directory, and the choice of a backend by its URL. Refuses to change an object,
and to show half of one. The order of steps in `put` and what a crash leaves after each is in docs/snapshot-format.md.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from torpor.config import Secret, StoreSettings
from torpor.core.clock import Clock
from torpor.core.crash import crash_point
from torpor.core.errors import MachineUnfit, NotFound
from torpor.snapshots.lease import FlockLeases, Leases

_KEY = re.compile(r"[a-z]+/[a-z0-9_]{2,128}")
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_OBJECTS = frozenset({"partial", "leases"})
"""Directories of a local store that are no kind of object."""


class Entry(NamedTuple):
    """An object as a listing shows it; `written_ns` is by the store's own clock."""

    key: str
    stored_bytes: int
    written_ns: int


class Backend(Protocol):
    """Keys are `kind/name` in lower-case letters, digits and underscores.

    Safe to use from several threads, which is how much is read quickly: no thread holds up another's request.

    Raises (from every method):
        MachineUnfit: `storage_failed`; of an object store also `storage_unreachable`, after it tried for a while.
    """

    @property
    def name(self) -> str:
        """What people call it: a directory, or the URL of a bucket."""
        ...

    def ready(self) -> None:
        """Do what has to come before the first `put`, so that a store that can't be used is told of early.

        Raises:
            MachineUnfit: `storage_unsafe`, the store does not keep the promise of `put`.
        """
        ...

    def put(self, key: str, data: bytes) -> bool:
        """Create the object, durable on return; True if it was new, False if the key existed (which is left
        alone).

        After an error there is no object or, if the answer was lost on its way, the whole one.

        Raises:
            MachineUnfit: no_space.
        """
        ...

    def get(self, key: str) -> bytes:
        """Raises NotFound (object_not_found)."""
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer where the object ends. Raises NotFound (object_not_found)."""
        ...

    def exists(self, key: str) -> bool: ...

    def absent(self, keys: Iterable[str]) -> set[str]:
        """Those of `keys` that do not exist."""
        ...

    def delete(self, key: str) -> None:
        """Absent afterwards, whether it was there or not."""
        ...

    def delete_many(self, keys: Iterable[str]) -> None:
        """As `delete` for each, quicker. Some may be gone after an error."""
        ...

    def list(self, prefix: str) -> list[str]:
        """All keys that start with `prefix`, sorted.

        An object store may list late: what was just created can be missing, what was just deleted can be there. Only
        `exists` says that an object is absent.
        """
        ...

    def entries(self, prefix: str) -> Sequence[Entry]:
        """As `list`, with sizes and times."""
        ...

    def now_ns(self) -> int:
        """What an object would be stamped with that were written now: ages are told by one clock."""
        ...

    @property
    def leases(self) -> Leases:
        """What keeps a collector from sweeping under the feet of others."""
        ...

    def close(self) -> None:
        """Let what is still being tried give up. Nothing else may be asked afterwards."""
        ...


def open_backend(
    settings: StoreSettings, read_key: Callable[[], Secret | None], *, clock: Clock, spare_bytes: int = 0
) -> Backend:
    """The backend that the settings' URL names. Only a local directory is touched.

    Args:
        read_key: gives what `settings.key` names; asked once, on a worker thread, before the first request. What it
            raises, and `config_invalid` for a key that is none, comes from the method that needed it.
        spare_bytes: see `LocalDirectory`.

    Raises:
        MachineUnfit: `storage_failed`, the directory can't be made.
    """
    if settings.url.startswith("file://"):
        return LocalDirectory(Path(settings.url.removeprefix("file://")), spare_bytes=spare_bytes)
    from torpor.snapshots.object_store import open_object_store  # Loaded by those who have one.

    return open_object_store(settings, read_key, clock=clock)


def is_key(text: str) -> bool:
    return _KEY.fullmatch(text) is not None and not text.startswith("partial/")


def check_key(key: str) -> str:
    """Refuse what is no object's key; gives it back."""
    if not is_key(key) or key.split("/", maxsplit=1)[0] in _NOT_OBJECTS:
        raise ValueError(f"malformed object key {key!r}")
    return key


@contextlib.contextmanager
def storage_errors(action: str) -> Generator[None]:
    """Translate the operating system's refusals: `action` reads like "write object packs/ab"."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _OUT_OF_SPACE:
            raise MachineUnfit(
                "no_space",
                f"cannot {action}: {reason}",
                hint="Free some disk space, or raise the quota, then try again.",
            ) from error
        hint = (
            "Is the directory this user's, is its file system mounted read-only, and what says the kernel's log of it?"
        )
        raise MachineUnfit("storage_failed", f"cannot {action}: {reason}", hint=hint) from error


class LocalDirectory:
    """A directory tree: `root/kind/<last two characters of name>/name`, with `root/partial` for what is being
    written.
    """

    def __init__(self, root: Path, *, spare_bytes: int = 0) -> None:
        """Args:
        spare_bytes: what a put leaves free on the disk, for the event log: it is there to say that the disk is full.
        """
        self._root = root
        self._spare_bytes = spare_bytes
        self._partial = root / "partial"
        with storage_errors(f"open store {root}"):
            _make_private(self._partial)
            _make_private(root / "leases")
            self._sweep_partials()
        self._leases = FlockLeases(root / "leases")

    @property
    def name(self) -> str:
        return str(self._root)

    def ready(self) -> None:
        """Nothing is left to do: link(2) never replaces a name."""

    def put(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with storage_errors(f"write object {key}"):
            _make_private(path.parent)
            # What makes room may take the last of it.
            is_spared = key.startswith("condemned/")
            if (
                self._spare_bytes
                and not is_spared
                and shutil.disk_usage(self._root).free < len(data) + self._spare_bytes
            ):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with self._open_partial() as (descriptor, partial):
                _write_all(descriptor, data)
                crash_point("backend.partial_written")
                os.fsync(descriptor)
                is_new = _link_if_absent(partial, path)
                crash_point("backend.linked")
                # Also when the object was there: its writer may have died before it made the name durable.
                for directory in (path.parent, path.parent.parent, self._root):
                    _fsync_directory(directory)
        return is_new

    def get(self, key: str) -> bytes:
        with self._open_object(key) as descriptor:
            return _read(descriptor, 0, os.fstat(descriptor).st_size)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._open_object(key) as descriptor:
            return _read(descriptor, start, length)

    def exists(self, key: str) -> bool:
        with storage_errors(f"look for object {key}"):
            return self._path(key).exists()

    def absent(self, keys: Iterable[str]) -> set[str]:
        return {key for key in keys if not self.exists(key)}

    def delete(self, key: str) -> None:
        path = self._path(key)
        with storage_errors(f"delete object {key}"), contextlib.suppress(FileNotFoundError):
            path.unlink()
            _fsync_directory(path.parent)

    def delete_many(self, keys: Iterable[str]) -> None:
        directories: set[Path] = set()
        with storage_errors("delete objects"):
            for path in map(self._path, keys):
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                    directories.add(path.parent)
            for directory in directories:
                _fsync_directory(directory)

    def list(self, prefix: str) -> list[str]:
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str) -> Sequence[Entry]:
        kind, slash, _ = prefix.partition("/")
        with storage_errors("list objects"):
            kinds = [kind] if slash else [path.name for path in self._root.iterdir() if path.name.startswith(kind)]
            found = [entry for kind in kinds if kind not in _NOT_OBJECTS for entry in self._entries_of(kind)]
        return sorted(entry for entry in found if entry.key.startswith(prefix))

    def now_ns(self) -> int:
        """The file system's clock, which stamps files too; nothing is created, since the disk may be full."""
        with storage_errors("read the store's clock"):
            os.utime(self._partial)
            return self._partial.stat().st_mtime_ns

    @property
    def leases(self) -> Leases:
        return self._leases

    def _entries_of(self, kind: str) -> Iterator[Entry]:
        for directory in _scanned(self._root / kind):
            for file in _scanned(Path(directory)):
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat(follow_symlinks=False)
                    yield Entry(f"{kind}/{file.name}", status.st_size, status.st_mtime_ns)

    def close(self) -> None:
        """Nothing is tried again here."""

    def _path(self, key: str) -> Path:
        kind, name = check_key(key).split("/")
        return self._root / kind / name[-2:] / name

    @contextlib.contextmanager
    def _open_object(self, key: str) -> Generator[int]:
        with storage_errors(f"read object {key}"):
            try:
                descriptor = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError as error:
                raise NotFound("object_not_found", f"cannot read object {key}: it does not exist") from error
            try:
                yield descriptor
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def _open_partial(self) -> Generator[tuple[int, Path]]:
        """A new file that no sweep removes while this process lives, and that is gone at the end."""
        while True:
            partial = self._partial / secrets.token_hex(8)
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.fstat(descriptor).st_nlink == 0:
                    continue  # A sweep came between creation and lock.
                crash_point("backend.partial_created")
                yield descriptor, partial
            finally:
                partial.unlink(missing_ok=True)
                os.close(descriptor)
            return

    def _sweep_partials(self) -> None:
        """Remove what dead writers left: a live one holds its lock."""
        for partial in self._partial.iterdir():
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    partial.unlink()
                finally:
                    os.close(descriptor)


def _scanned(directory: Path) -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _make_private(directory: Path) -> None:
    """Also the directories above that do not exist yet, which `mkdir(parents=True)` would open to all. Durable."""
    if not directory.is_dir():
        _make_private(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)
        _fsync_directory(directory.parent)


def _link_if_absent(partial: Path, path: Path) -> bool:
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    return True


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read(descriptor: int, start: int, length: int) -> bytes:
    pieces: list[bytes] = []
    while length > 0:
        piece = os.pread(descriptor, length, start)
        if not piece:
            break
        pieces.append(piece)
        start += len(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
