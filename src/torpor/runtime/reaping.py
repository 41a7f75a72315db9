"""What nodes that died have left on this machine and nobody will come back for; a node daemon frees it when it starts.

Sandboxes, with their FIFOs, directories and warm slots, of sessions that sleep or have ended; staged images of sessions
that have ended or are gone, and of TORPOR_HOMEs that are gone; programs that were being installed; sockets that nobody
answers on. A session that a node has is left alone, and so is the sandbox of one that may still be adopted.
"""

import asyncio
import contextlib
import socket
from pathlib import Path

import msgspec

from torpor.core.errors import NotFound
from torpor.core.ids import SessionId
from torpor.core.session import ENDED, MAY_HOLD_SANDBOX
from torpor.db import sessions
from torpor.db.sessions import Session
from torpor.runtime import image_cache, leasing
from torpor.runtime.incarnation import sweep
from torpor.runtime.runtime import Runtime
from torpor.runtime.spec import SessionSpec, session_of_sandbox


async def reap(runtime: Runtime, me: leasing.Holder) -> None:
    """Free it, for as many sessions as nobody has."""
    driver = runtime.drivers(await runtime.runsc()).present
    staged = image_cache.staging_directory(runtime.home.root)
    found = {session_of_sandbox(name) for name in driver.sandbox_ids()}
    found |= {SessionId(path.name) for path in image_cache.directories(staged)}
    for session_id in sorted(found):
        lock = leasing.acquire_free_lock(runtime.home.lock(session_id), me)
        if lock is None:
            continue
        try:
            session = await _find(runtime, session_id)
            if session is not None and session.status not in MAY_HOLD_SANDBOX:
                spec = msgspec.convert(session.spec, SessionSpec)
                await sweep(runtime.home, session_id, spec, driver, keep=None)
            if session is None or session.status in ENDED:
                await asyncio.to_thread(image_cache.free, staged / session_id)
        finally:
            lock.release()
    await asyncio.to_thread(_remove_dead_sockets, runtime.home.root / "run")
    await asyncio.to_thread(runtime.home.sweep_unfinished)
    await asyncio.to_thread(image_cache.free_orphans)


async def _find(runtime: Runtime, session_id: SessionId) -> Session | None:
    with contextlib.suppress(NotFound):
        return await runtime.database.read(lambda tx: sessions.get(tx, session_id))
    return None


def _remove_dead_sockets(directory: Path) -> None:
    for path in directory.glob("*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                continue  # It is just being made, or its path is too long to say.
