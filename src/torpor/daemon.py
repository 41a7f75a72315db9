"""The node daemon (`torpor up`): one process that runs every session that nobody attends, and wakes sleepers in time.

It may die at any time, as any node: sandboxes outlive it, and the next one adopts them. A TORPOR_HOME has one daemon at
most; its lock file says where to reach it.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from torpor import __version__, wire
from torpor.core.errors import Conflict
from torpor.core.ids import SessionId
from torpor.node import Node, upstreams_digest
from torpor.runtime import leasing
from torpor.runtime.joining import Aside
from torpor.runtime.owner import Owner
from torpor.runtime.reaping import reap
from torpor.runtime.runtime import Runtime, node_holder
from torpor.runtime.scheduling import Scheduler, Wish
from torpor.runtime.watcher import Watcher

logger = logging.getLogger(__name__)


class DaemonWatcher(Watcher):
    """What happens to a session is a line of the daemon's log; output is in the event log."""

    def __init__(self, session_id: SessionId) -> None:
        self._session_id = session_id

    def notice(self, text: str) -> None:
        logger.info("session %s: %s", self._session_id, text)


async def run_daemon(node: Node, *, idle_seconds_max: float | None = None) -> None:
    """Be the node daemon, until SIGTERM or `torpor down`, or until there has been nothing to run for so long.

    Raises:
        Conflict: `daemon_running`: another process is it.
        MachineUnfit: it could run nothing: said before anybody is told that it is there.
    """
    runtime = node.runtime
    await runtime.runsc()
    scheduler = Scheduler(
        home=runtime.home,
        database=runtime.database,
        clock=runtime.clock,
        own=partial(_own, node),
        starts_max=runtime.starts_max,
        idle_seconds_max=idle_seconds_max,
    )
    # Who finds the lock taken asks its holder at once: first the socket, then the lock.
    async with node.serving(_verbs(runtime, scheduler)):
        me = node_holder(runtime.home, node.holder.node_id)
        lock = leasing.acquire_free_lock(runtime.home.daemon_lock, me)
        if lock is None:
            raise Conflict("daemon_running", "cannot start a node daemon: one runs", hint="torpor status; torpor down")
        try:
            async with _signals(scheduler):
                await reap(runtime, me)
                await scheduler.run()
        finally:
            lock.release()


def _verbs(runtime: Runtime, scheduler: Scheduler) -> dict[str, wire.Verb]:
    started_ns = runtime.clock.wall_ns()

    async def status() -> dict[str, Any]:
        return {"started_ns": started_ns, "upstreams": upstreams_digest(runtime), **_status(scheduler)}

    async def look() -> dict[str, Any]:
        scheduler.look()
        return {}

    async def start(session: str, let_go: bool, boot: bool) -> dict[str, Any]:
        await scheduler.start(SessionId(session), Wish(let_go=let_go, boot=boot))
        return {}

    async def down(leave: bool) -> dict[str, Any]:
        scheduler.leave() if leave else scheduler.stop()
        return {"pid": os.getpid()}

    return {"status": status, "look": look, "start": start, "down": down}


def _own(node: Node, session_id: SessionId, wish: Wish, aside: Aside) -> contextlib.AbstractAsyncContextManager[Owner]:
    watcher = DaemonWatcher(session_id)
    return node.owning(session_id, watcher, attended=False, let_go=wish.let_go, boot=wish.boot, aside=aside)


@contextlib.asynccontextmanager
async def _signals(scheduler: Scheduler) -> AsyncGenerator[None]:
    """SIGTERM and Ctrl-C put every session to sleep first; they go on with the next daemon."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, scheduler.stop)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _status(scheduler: Scheduler) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "version": __version__,
        "sessions": [
            {"session": session_id, "state": _state(run.owner), "memory_promised_bytes": run.needs_bytes}
            for session_id, run in scheduler.runs.items()
        ],
        "failures": [
            {"session": session_id, "code": failure.code, "reason": failure.reason, "times": failure.times}
            for session_id, failure in scheduler.failures.items()
        ],
    }


def _state(owner: Owner | None) -> str:
    if owner is None or not owner.begun.is_set():
        return "starting"
    return owner.tier.value if owner.tier is not None else "running"
