"""Store leases: whoever reads or writes snapshots holds one, and a collector sweeps around those that are held.

A lease names no object. It says that its holder is under way: from before a save reads what its parent stored until its
checkpoint is committed, from before a reader reads the rows that name a snapshot until it has read the snapshot. The
rules that make this enough are in docs/collecting.md. In here: the protocol, and leases on one machine, which are
flocks and end with their holder, however it dies.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import threading
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from torpor.core.clock import Clock, SystemClock
from torpor.core.errors import Conflict


class Lease(Protocol):
    """One holder's; also a context."""

    def check(self) -> None:
        """Refuse to go on when it may have ended: before a step that others must not have swept the ground of.

        Raises:
            Conflict: `lease_lost`.
        """
        ...

    def release(self) -> None:
        """Done already is fine."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Release it."""
        ...


class Leases(Protocol):
    """All leases of one store. Raises as its backend does."""

    def hold(self) -> Lease:
        """Take one; when this returns, `held` knows it."""
        ...

    def hold_alone(self) -> Lease:
        """Take the collector's, which no two hold; `held` does not know it.

        Raises:
            Conflict: `collect_running`.
        """
        ...

    def settle(self) -> None:
        """Wait until `held` misses no lease that was taken before, where listings are behind."""
        ...

    def held(self) -> set[str]:
        """Names of the leases that are held now."""
        ...

    def wait(self, names: set[str], seconds: float) -> set[str]:
        """Wait until these leases have ended; gives those that had not in that time."""
        ...


class FlockLease:
    """An open file that is locked."""

    def __init__(self, descriptor: int, path: Path | None = None) -> None:
        self._descriptor = descriptor
        self._path = path

    def check(self) -> None:
        """Nobody can take it away."""

    def release(self) -> None:
        if self._descriptor >= 0:
            if self._path is not None:
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


_WITHOUT_A_FILE = "directory"
_CANNOT_CREATE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


class FlockLeases:
    """Leases in `directory`, one locked file each. Where no file can be made, a shared lock on the directory itself
    does: a full disk must not keep a session from being restored, nor a collector from making room.
    """

    def __init__(self, directory: Path, clock: Clock | None = None) -> None:
        self._directory = directory
        self._clock = clock or SystemClock()

    def hold(self) -> Lease:
        while True:
            path = self._directory / secrets.token_hex(8)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except OSError as error:
                if error.errno in _CANNOT_CREATE:
                    return self._hold_directory()
                raise
            lease = FlockLease(descriptor, path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.fstat(descriptor).st_nlink:
                    return lease
            except BaseException:
                lease.release()
                raise
            lease.release()  # `held` came between creation and lock, and took it for a dead holder's.

    def hold_alone(self) -> Lease:
        descriptor = os.open(self._directory.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise collect_running() from error
        return FlockLease(descriptor)

    def settle(self) -> None:
        """A directory is never behind."""

    def held(self) -> set[str]:
        names = [*(path.name for path in self._directory.iterdir()), _WITHOUT_A_FILE]
        return {name for name in names if self._is_held(name)}

    def wait(self, names: set[str], seconds: float) -> set[str]:
        deadline = self._clock.monotonic() + seconds
        left: set[str] = set()
        for name in names:
            # A lock that becomes free wakes this thread; nothing but the end of the process ends its wait before.
            waiting = threading.Thread(target=self._wait, args=[name], daemon=True)
            waiting.start()
            waiting.join(max(0.0, deadline - self._clock.monotonic()))
            if waiting.is_alive():
                left.add(name)
        return left

    def _hold_directory(self) -> Lease:
        descriptor = self._open(_WITHOUT_A_FILE)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return FlockLease(descriptor)

    def _open(self, name: str) -> int:
        path = self._directory if name == _WITHOUT_A_FILE else self._directory / name
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _is_held(self, name: str) -> bool:
        """Whether its holder lives; a dead one's file is removed."""
        try:
            descriptor = self._open(name)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if name != _WITHOUT_A_FILE:
                with contextlib.suppress(FileNotFoundError):
                    (self._directory / name).unlink()
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _wait(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            descriptor = self._open(name)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            finally:
                os.close(descriptor)


def collect_running() -> Conflict:
    return Conflict(
        "collect_running",
        "cannot collect: another process is collecting in this store",
        hint="Wait for it; what it leaves is collected the next time.",
    )
