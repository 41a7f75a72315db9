"""Opens the backend of snapshots that the user configured, once, when something needs it: most commands read rows."""

import asyncio
from collections.abc import Callable

from torpor.config import StoreSettings
from torpor.core.clock import Clock
from torpor.core.errors import MachineUnfit, TorporError
from torpor.db.database import BlobStore
from torpor.gateway.keys import NoKeyError, read_key
from torpor.sandbox.selftest import Finding
from torpor.snapshots.backend import Backend, open_backend
from torpor.snapshots.probe import probe

SPARE_BYTES = 4 << 20
"""Left free by snapshots for the event log, which is on the same disk."""


class Storage:
    """One process's access to the backend of its snapshot store."""

    def __init__(self, settings: StoreSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._opening = asyncio.Lock()
        self._backend: Backend | None = None

    async def open(self) -> Backend:
        """The backend; an object store is not asked for anything yet.

        Raises:
            InvalidInput: `config_invalid`.
            MachineUnfit: `store_key_missing`, `storage_failed`.
        """
        async with self._opening:
            if self._backend is None:
                self._backend = await open_configured(self._settings, self._clock)
            return self._backend

    async def blobs(self) -> BlobStore:
        """The backend for large bodies of the event log; where it can't be opened, only these can't be read."""
        try:
            return await self.open()
        except TorporError as error:
            return _Unopened(error)

    async def ready(self) -> Backend:
        """The backend, which has shown that it can be written to.

        Raises:
            MachineUnfit: `storage_unsafe`, `storage_unreachable`; else as `open`.
        """
        backend = await self.open()
        await asyncio.to_thread(backend.ready)
        return backend

    async def ready_or_down(self, notice: Callable[[str], None]) -> Backend:
        """As `ready`, but a store that is only down for now is told of: a session whose sandbox lives can go on."""
        try:
            return await self.ready()
        except MachineUnfit as unfit:
            if unfit.code != "storage_unreachable":
                raise
            notice(f"no checkpoint can be made for now: {unfit}")
            return await self.open()

    def close(self) -> None:
        """Give up what still waits for the store."""
        if self._backend is not None:
            self._backend.close()


class _Unopened:
    """Says at each use why the backend was not opened."""

    def __init__(self, error: TorporError) -> None:
        self._error = error

    def put(self, key: str, data: bytes) -> bool:  # noqa: ARG002
        raise self._error

    def get(self, key: str) -> bytes:  # noqa: ARG002
        raise self._error

    def delete(self, key: str) -> None:  # noqa: ARG002
        raise self._error

    def list(self, prefix: str) -> list[str]:  # noqa: ARG002
        raise self._error


async def open_configured(settings: StoreSettings, clock: Clock) -> Backend:
    """The backend with its key, which is read now."""
    try:
        key = await read_key(settings.key, clock)
    except NoKeyError as error:
        hint = "It is named by key_env or key_command of [store] in config.toml."
        raise MachineUnfit("store_key_missing", f"cannot open {settings.url}: {error}", hint=hint) from error
    return await asyncio.to_thread(open_backend, settings, key, clock=clock, spare_bytes=SPARE_BYTES)


async def examine_store(settings: StoreSettings, clock: Clock) -> Finding:
    """Write, write again, read and remove an object, as `torpor doctor` tells it."""
    check = "snapshot store"
    try:
        backend = await open_configured(settings, clock)
        await asyncio.to_thread(backend.ready)
        await asyncio.to_thread(probe, backend)
    except TorporError as error:
        return Finding(check=check, ok=False, detail=str(error), remedy=error.hint)
    detail = f"{backend.name}: creates objects, refuses to write them again, reads and removes them"
    return Finding(check=check, ok=True, detail=detail)
