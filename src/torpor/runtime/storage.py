"""Opens the backend that the user configured, and says how a node begins with it."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from torpor.config import Secret, StoreSettings
from torpor.core.clock import Clock
from torpor.core.errors import MachineUnfit, TorporError
from torpor.gateway.keys import NoKeyError, read_key_blocking
from torpor.sandbox.selftest import Finding
from torpor.snapshots.backend import Backend, LocalDirectory, open_backend
from torpor.snapshots.probe import probe

SPARE_BYTES = 4 << 20
"""Left free by snapshots for the event log, which is on the same disk."""


def open_configured(settings: StoreSettings, clock: Clock) -> Backend:
    """The backend. Its key is read when something is first asked of it: most commands only read rows.

    Raises:
        MachineUnfit: `storage_failed`; later, from the backend's methods, `store_key_missing`.
    """

    def read_key() -> Secret | None:
        try:
            return read_key_blocking(settings.key, clock)
        except NoKeyError as error:
            hint = "It is named by key_env or key_command of [store] in config.toml."
            raise MachineUnfit("store_key_missing", f"cannot open {settings.url}: {error}", hint=hint) from error

    return open_backend(settings, read_key, clock=clock, spare_bytes=SPARE_BYTES)


def open_blobs(directory: Path) -> LocalDirectory:
    """Where the large bodies of the event log are: beside the log, wherever its snapshots may be.

    A call must not wait for another machine before it is sent, and a session whose store is down goes on.

    Raises:
        MachineUnfit: `storage_failed`.
    """
    return LocalDirectory(directory, spare_bytes=SPARE_BYTES)


async def ready_or_down(backend: Backend, notice: Callable[[str], None]) -> None:
    """See that the store can be written to; one that is only down for now is told of.

    A session whose sandbox lives, or whose image is still in memory, can go on without it.

    Raises:
        MachineUnfit: the store can't be used at all.
    """
    try:
        await asyncio.to_thread(backend.ready)
    except MachineUnfit as unfit:
        if unfit.code != "storage_unreachable":
            raise
        notice(f"no checkpoint can be made for now: {unfit}")


def examine_store(settings: StoreSettings, clock: Clock) -> Finding:
    """Write, write again, read and remove an object, as `torpor doctor` tells it."""
    check = "snapshot store"
    try:
        backend = open_configured(settings, clock)
        backend.ready()
        probe(backend)
    except TorporError as error:
        return Finding(check=check, ok=False, detail=str(error), remedy=error.hint)
    detail = f"{backend.name}: creates objects, refuses to write them again, reads and removes them"
    return Finding(check=check, ok=True, detail=detail)
