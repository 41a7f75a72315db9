"""The backend over an object store (S3, Google Cloud Storage, Azure): one object, one request, created only if absent.

Owns what is sent again and for how long: a client of `obstore` sends each request once, because a create that is sent
again can meet its own first try. What a crash leaves is in docs/snapshot-format.md.
"""

import random
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from torpor.config import Secret, StoreSettings
from torpor.core.clock import Clock
from torpor.core.errors import MachineUnfit, NotFound
from torpor.snapshots.backend import Entry, check_key, is_key
from torpor.snapshots.lease import Leases
from torpor.snapshots.object_lease import ObjectLeases
from torpor.snapshots.object_store_clients import Clients, make_clients
from torpor.snapshots.object_store_trouble import NotSettledError, Trouble, trouble_of
from torpor.snapshots.probe import probe

if TYPE_CHECKING:
    from obstore import ObjectMeta

_T = TypeVar("_T")

THREADS = 16
"""Of a question about many objects: the wait for an answer is what takes time, not this machine."""
READY_SECONDS = 10.0
"""For how long `ready` tries: somebody waits for it."""
FIRST_PAUSE_SECONDS, PAUSE_SECONDS_MAX = 0.2, 5.0


class ObjectStore:
    """A bucket, or the part of one below a prefix."""

    def __init__(self, connect: Callable[[], Clients], *, name: str, clock: Clock, retry_seconds: float) -> None:
        """Args:
        connect: called once, before the first request.
        """
        self._connect = connect
        self._connecting = threading.Lock()
        self._connected: Clients | None = None
        self._name = name
        self._clock = clock
        self._retry_seconds = retry_seconds
        self._probing = threading.Lock()
        self._is_probed = False
        self._closed = threading.Event()
        self._leases = ObjectLeases(self, clock)

    @property
    def name(self) -> str:
        return self._name

    def ready(self) -> None:
        self._probe(min(self._retry_seconds, READY_SECONDS))

    def put(self, key: str, data: bytes) -> bool:
        check_key(key)
        self._probe(self._retry_seconds)
        may_be_there = False

        def create() -> bool:
            nonlocal may_be_there
            try:
                obstore.put(self._clients().writes, key, data, mode="create", use_multipart=False)
            except AlreadyExistsError as error:
                return self._is_ours(key, data if may_be_there else None, error)
            except BaseError:
                may_be_there = True
                raise
            return True

        return self._insist(f"write object {key}", create)

    def get(self, key: str) -> bytes:
        check_key(key)
        return self._insist(f"read object {key}", lambda: obstore.get(self._clients().reads, key).bytes().to_bytes())

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_key(key)

        def read() -> bytes:
            if length > 0:
                try:
                    return obstore.get_range(self._clients().reads, key, start=start, length=length).to_bytes()
                except BaseError as error:
                    if not trouble_of(error).is_outside:
                        raise
            obstore.head(self._clients().reads, key)  # Nothing of nothing is not found.
            return b""

        return self._insist(f"read object {key}", read)

    def exists(self, key: str) -> bool:
        check_key(key)

        def look() -> bool:
            try:
                obstore.head(self._clients().reads, key)
            except FileNotFoundError:
                return self._is_there(key)
            return True

        return self._insist(f"look for object {key}", look)

    def absent(self, keys: Iterable[str]) -> set[str]:
        wanted = list(keys)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="look-for") as threads:
            return {key for key, there in zip(wanted, threads.map(self.exists, wanted), strict=True) if not there}

    def delete(self, key: str) -> None:
        check_key(key)

        def remove() -> None:
            try:
                obstore.delete(self._clients().writes, key)
            except FileNotFoundError as error:
                if not trouble_of(error).is_absent:
                    raise

        self._insist(f"delete object {key}", remove)

    def delete_many(self, keys: Iterable[str]) -> None:
        with ThreadPoolExecutor(THREADS, thread_name_prefix="delete") as threads:
            for _ in threads.map(self.delete, keys):
                pass

    def list(self, prefix: str) -> list[str]:
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str) -> Sequence[Entry]:
        # A client's prefix is whole names between slashes, so names that only begin so are picked out here. What is no
        # key is somebody else's.
        kind, slash, _ = prefix.partition("/")

        def look() -> Sequence[Entry]:
            # Its other overload, which nobody asks for, has the types of a package that is not installed.
            pages = obstore.list(self._clients().reads, prefix=kind if slash else None)  # pyright: ignore[reportUnknownMemberType]
            return sorted(
                _entry(found)
                for page in pages
                for found in page
                if found["path"].startswith(prefix) and is_key(found["path"])
            )

        return self._insist("list objects", look)

    def now_ns(self) -> int:
        """A store tells its time only by what it stamps."""
        key = f"probes/{secrets.token_hex(16)}"
        self.put(key, b"")
        try:
            return self._insist(
                f"look at object {key}", lambda: _entry(obstore.head(self._clients().reads, key)).written_ns
            )
        finally:
            self.delete(key)

    @property
    def leases(self) -> Leases:
        return self._leases

    def close(self) -> None:
        self._closed.set()

    def _clients(self) -> Clients:
        with self._connecting:
            if self._connected is None:
                self._connected = self._connect()
            return self._connected

    def _probe(self, patience_seconds: float) -> None:
        """Once, before the first write: a store that breaks the promise gets no object to overwrite."""
        if self._is_probed:
            return
        with self._probing:
            if not self._is_probed:
                self._clients()  # What the copy has is its own.
                trying = copy(self)
                trying._is_probed, trying._retry_seconds = True, patience_seconds
                probe(trying)
                self._is_probed = True

    def _is_ours(self, key: str, sent_before: bytes | None, refusal: AlreadyExistsError) -> bool:
        """The store refused to create: is what is there our own object, of a try whose answer was lost?

        Args:
            sent_before: the bytes of such a try; None if there was none.
        """
        try:
            if sent_before is not None:
                return obstore.get(self._clients().reads, key).bytes().to_bytes() == sent_before
            obstore.head(self._clients().reads, key)
        except FileNotFoundError:
            # S3 refuses with 409 while another writer is under way, who may yet fail.
            raise NotSettledError from refusal
        return False

    def _is_there(self, key: str) -> bool:
        """Ask again, in a way that gets an answer with words in it: is it the object that is missing, or the bucket?"""
        try:
            obstore.get(self._clients().reads, key).bytes()
        except FileNotFoundError as error:
            if trouble_of(error).is_absent:
                return False
            raise
        return True

    def _insist(self, action: str, attempt: Callable[[], _T]) -> _T:
        """Try until it is done, is refused for good, or has failed for `retry_seconds`."""
        started = self._clock.monotonic()
        number = 0
        while True:
            try:
                return attempt()
            except (BaseError, OSError, ValueError) as error:
                trouble = trouble_of(error)
            pause = _pause_seconds(number)
            is_over = self._clock.monotonic() + pause > started + self._retry_seconds
            if not trouble.passes or is_over or self._closed.wait(pause):
                # Without its cause on purpose, whose text may hold credentials: see object_store_trouble.
                raise self._failure(action, trouble, self._clock.monotonic() - started)
            number += 1

    def _failure(self, action: str, trouble: Trouble, seconds: float) -> MachineUnfit | NotFound:
        if trouble.is_absent:
            return NotFound("object_not_found", f"cannot {action}: it does not exist in {self._name}")
        if trouble.is_full:
            return MachineUnfit("no_space", f"cannot {action}: {self._name} is full", hint="Make room in the store.")
        if not trouble.passes:
            return MachineUnfit(
                "storage_failed", f"cannot {action} in {self._name}: {trouble.reason}", hint=trouble.hint
            )
        return MachineUnfit(
            "storage_unreachable",
            f"cannot {action} in {self._name}: {trouble.reason} (tried for {seconds:.1f} s)",
            hint=trouble.hint,
        )


def _entry(found: "ObjectMeta") -> Entry:
    return Entry(found["path"], found["size"], round(found["last_modified"].timestamp() * 1e9))


def _pause_seconds(number: int) -> float:
    """Doubling, and not the same for all who lost the store at the same instant."""
    return min(PAUSE_SECONDS_MAX, FIRST_PAUSE_SECONDS * 2 ** min(number, 20)) * random.uniform(0.75, 1.0)


def open_object_store(settings: StoreSettings, read_key: Callable[[], Secret | None], *, clock: Clock) -> ObjectStore:
    """See `backend.open_backend`."""
    at = f" at {settings.endpoint}" if settings.endpoint else ""
    return ObjectStore(
        lambda: make_clients(settings, read_key()),
        name=f"{settings.url}{at}",
        clock=clock,
        retry_seconds=settings.retry_seconds,
    )
