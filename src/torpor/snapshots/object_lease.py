"""Store leases as objects, for a store that several machines share and that has no locks: they end by time.

A lease is `holders/<name>_<generation>`, of which only the newest generation counts. Its holder creates the next one
every RENEW_SECONDS and removes the one before. When the newest is older than LEASE_SECONDS, by the store's own clock,
others may break the lease, by creating the next generation themselves. That a key can be created only once makes this
exact: either the holder renews or another breaks, never both, and `check` renews. So no clock of the holder has a part
in it, which may have slept. The collector's lease has the name `collect`; it is taken by creating its next generation,
and given back by one that says so.
"""

import contextlib
import logging
import secrets
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Self

from torpor.core.clock import Clock
from torpor.core.errors import Conflict, NotFound, TorporError
from torpor.snapshots.lease import collect_running

if TYPE_CHECKING:
    from torpor.snapshots.backend import Backend

logger = logging.getLogger(__name__)

LEASE_SECONDS = 120.0
RENEW_SECONDS = 30.0
_REMEMBERED_SECONDS = 24 * 3600.0
"""For how long a broken lease is kept, for a holder that sleeps."""
_LOOK_SECONDS = 1.0
_ALONE = "collect"
_HELD, _BROKEN, _FREE = b"held", b"broken", b"free"
"""What an object begins with. More follows, different for each: a backend whose answer was lost knows its own by it."""
_NS = 1_000_000_000


class ObjectLease:
    """Renewed by a thread of its own until it is released."""

    def __init__(self, backend: "Backend", name: str, generation: int) -> None:
        """The object of this generation is there, and is this lease's."""
        self._backend = backend
        self._name = name
        self._generation = generation
        self._is_lost = False
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._renewing = threading.Thread(target=self._renew_until_released, daemon=True, name=f"lease-{name}")
        self._renewing.start()

    def check(self) -> None:
        if not self._renew():
            raise Conflict(
                "lease_lost",
                "cannot go on with the snapshot store: the lease on it ended, and something may have been collected",
                hint="The store was out of reach for minutes, or this machine slept. Try again.",
            )

    def release(self) -> None:
        self._released.set()
        self._renewing.join()
        with contextlib.suppress(TorporError):  # What can't be removed is broken in time.
            if self._name == _ALONE:
                self._backend.put(_key(self._name, self._generation + 1), _says(_FREE))
            self._backend.delete(_key(self._name, self._generation))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def _renew_until_released(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            try:
                self._renew()
            except TorporError as error:
                logger.warning("lease not renewed: %s", error)

    def _renew(self) -> bool:
        """Whether it is still held; then it is for another LEASE_SECONDS."""
        with self._lock:
            if self._is_lost:
                return False
            present, following = _key(self._name, self._generation), _key(self._name, self._generation + 1)
            # A broken lease is forgotten after a while, and its next generation could be created again.
            self._is_lost = not self._backend.exists(present) or not self._backend.put(following, _says(_HELD))
            if not self._is_lost:
                self._generation += 1
                self._backend.delete(present)
            return not self._is_lost


class ObjectLeases:
    def __init__(self, backend: "Backend", clock: Clock, *, lag_seconds: float = 0.0) -> None:
        """Args:
        lag_seconds: for how long the store's listings may lack what was created.
        """
        self._backend = backend
        self._clock = clock
        self._lag_seconds = lag_seconds

    def hold(self) -> ObjectLease:
        name = secrets.token_hex(8)
        self._backend.put(_key(name, 0), _says(_HELD))
        return ObjectLease(self._backend, name, 0)

    def hold_alone(self) -> ObjectLease:
        newest, age_seconds = self._generations().get(_ALONE, (-1, 0.0))
        is_taken = newest >= 0 and age_seconds <= LEASE_SECONDS and self._read(_ALONE, newest) != _FREE
        if is_taken or not self._backend.put(_key(_ALONE, newest + 1), _says(_HELD)):
            raise collect_running()
        if newest >= 0:
            self._backend.delete(_key(_ALONE, newest))
        return ObjectLease(self._backend, _ALONE, newest + 1)

    def settle(self) -> None:
        threading.Event().wait(self._lag_seconds)

    def held(self) -> set[str]:
        newest = self._generations()
        return {name for name, found in newest.items() if name != _ALONE and self._is_held(name, *found)}

    def wait(self, names: set[str], seconds: float) -> set[str]:
        """Nothing tells of a removed object: look again."""
        deadline, pause = self._clock.monotonic() + seconds, threading.Event()
        while left := names & self.held():
            if self._clock.monotonic() >= deadline:
                return left
            pause.wait(_LOOK_SECONDS)
        return set()

    def _is_held(self, name: str, newest: int, age_seconds: float) -> bool:
        """A lease that was not renewed is broken here, and then is not."""
        said = self._read(name, newest)
        if said == _BROKEN:
            if age_seconds > _REMEMBERED_SECONDS:
                self._backend.delete(_key(name, newest))
            return False
        if age_seconds <= LEASE_SECONDS or said != _HELD:
            return True  # Also when it is gone: it was renewed just now, or the listing is behind.
        if not self._backend.put(_key(name, newest + 1), _says(_BROKEN)):
            return True
        self._backend.delete(_key(name, newest))
        return False

    def _read(self, name: str, generation: int) -> bytes:
        """What this generation says; nothing, if it is not there any more."""
        with contextlib.suppress(NotFound):
            return self._backend.get(_key(name, generation)).partition(b" ")[0]
        return b""

    def _generations(self) -> dict[str, tuple[int, float]]:
        """The newest generation of each lease, and how old it is."""
        newest: dict[str, tuple[int, float]] = {}
        entries = self._backend.entries("holders/")
        now_ns = self._backend.now_ns() if entries else 0
        for entry in entries:
            name, _, number = entry.key.removeprefix("holders/").rpartition("_")
            found = int(number), (now_ns - entry.written_ns) / _NS
            newest[name] = max(newest.get(name, found), found)
        return newest


def _says(what: bytes) -> bytes:
    return what + b" " + secrets.token_hex(8).encode()


def _key(name: str, generation: int) -> str:
    return f"holders/{name}_{generation}"
