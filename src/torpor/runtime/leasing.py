"""One node's right to a session, on one machine: an flock that dies with its holder, and the owner_token in the log.

The lock says who may act now; the token, raised at each acquisition and checked in every statement, makes sure that a
holder that lost it without knowing writes nothing. The lock file names its holder for people and for take-over.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import select
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from torpor.core.errors import Conflict, MachineUnfit
from torpor.core.ids import NodeId, SessionId
from torpor.db import sessions
from torpor.db.database import Transaction

HolderAnswers = Callable[[Path], Awaitable[bool]]
"""Ask a node, over its socket, whether it is well; False when it is silent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """What a lock file says of who holds it.

    Attributes:
        is_brief: a command has it for a moment, and answers nobody meanwhile; who wants it waits.
    """

    node_id: NodeId
    pid: int
    socket: Path
    is_brief: bool = False


class SessionLock:
    """A held lock; let go by `release` or by the death of this process, whichever comes first."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def acquire(tx: Transaction, seen: sessions.Session, me: Holder, *, wall_ns: int) -> int:
    """Raise the token of a session whose lock is held; gives the new one.

    Raises:
        Superseded: another node was quicker, or it is gone.
    """
    return sessions.acquire(
        tx,
        session_id=seen.session_id,
        seen_token=seen.owner_token,
        node_id=me.node_id,
        boot_id=boot_id(),
        pid=me.pid,
        wall_ns=wall_ns,
    )


def boot_id() -> str:
    """Changes at each start of the machine: a row of another boot has no living owner and no living sandbox."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def read_holder(path: Path) -> Holder | None:
    """Who wrote the lock file last; None when it is empty or unreadable."""
    try:
        fields = json.loads(path.read_text())
        return Holder(
            node_id=NodeId(fields["node_id"]),
            pid=int(fields["pid"]),
            socket=Path(fields["socket"]),
            is_brief=bool(fields.get("is_brief")),
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def is_held(path: Path) -> bool:
    """Some living process holds the lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


async def wait_until_free(path: Path) -> None:
    """Wait for a holder that is about to let go."""
    with path.open("rb") as file:
        await asyncio.to_thread(fcntl.flock, file, fcntl.LOCK_SH)


async def acquire_lock(
    session_id: SessionId, path: Path, me: Holder, *, answers: HolderAnswers, deadline_seconds: float = 10
) -> SessionLock:
    """Take the session's lock. Who has it for a moment is waited for; a node that is alive but silent is killed first
    (through its pidfd, never by number).

    Raises:
        Conflict: `session_running`: a node that answers has it.
    """
    with contextlib.ExitStack() as undo:
        descriptor = _open_lock(path)
        undo.callback(os.close, descriptor)
        if not _try_lock(descriptor):
            holder = read_holder(path)
            if holder is None or not holder.is_brief:
                await _displace(session_id, path, answers, deadline_seconds)
            try:
                async with asyncio.timeout(deadline_seconds):
                    await asyncio.to_thread(fcntl.flock, descriptor, fcntl.LOCK_EX)
            except TimeoutError:
                raise _running(session_id, read_holder(path)) from None
        _sign(descriptor, me)
        undo.pop_all()
    return SessionLock(path, descriptor)


def acquire_free_lock(path: Path, me: Holder) -> SessionLock | None:
    """Take a session's lock if nobody has it: what can wait kills no silent holder, who may only be starting."""
    with contextlib.ExitStack() as undo:
        descriptor = _open_lock(path)
        undo.callback(os.close, descriptor)
        if not _try_lock(descriptor):
            return None
        _sign(descriptor, me)
        undo.pop_all()
    return SessionLock(path, descriptor)


def _open_lock(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _sign(descriptor: int, me: Holder) -> None:
    os.ftruncate(descriptor, 0)
    text = json.dumps({"node_id": me.node_id, "pid": me.pid, "socket": str(me.socket), "is_brief": me.is_brief})
    os.pwrite(descriptor, text.encode(), 0)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise MachineUnfit(
            "home_unlockable",
            f"cannot lock the session's file: {error}",
            hint="TORPOR_HOME must lie on a local file system.",
        ) from error
    return True


def _running(session_id: SessionId, holder: Holder | None) -> Conflict:
    node = f"node {holder.node_id}, pid {holder.pid}," if holder else "a node"
    return Conflict(
        "session_running",
        f"cannot take session {session_id}: {node} runs it",
        hint="`torpor log SESSION --follow` shows it; `torpor kill SESSION` ends it.",
    )


async def _displace(session_id: SessionId, path: Path, answers: HolderAnswers, deadline_seconds: float) -> None:
    """Make sure that whoever holds the lock is well (then refuse) or dead."""
    holder = read_holder(path)
    if holder is None or await answers(holder.socket):
        raise _running(session_id, holder)
    try:
        pidfd = os.pidfd_open(holder.pid)
    except ProcessLookupError:
        return
    try:
        # Between reading the number and opening it the holder may have died: the lock then is free at once.
        if read_holder(path) == holder and is_held(path):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            await asyncio.to_thread(select.select, [pidfd], [], [], deadline_seconds)
    finally:
        os.close(pidfd)
