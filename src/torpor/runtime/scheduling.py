"""Runs the sessions that are due on a node daemon: those that nobody attends, and sleepers whose time has come.

When a session is due stands in its row (`db/sleeping.py`); this looks when one comes to its time, when somebody says
that there is something new, and every few seconds for what nobody said. At most so many begin at a time, and only as
long as memory lasts. One that can't begin, or whose owner fails, is tried again, later and later.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

from torpor.core.clock import Clock
from torpor.core.errors import Conflict, NotFound, Superseded, TorporError, innermost
from torpor.core.ids import SessionId
from torpor.db import checkpoints, sessions, sleeping
from torpor.db.database import Database, Transaction
from torpor.runtime.home import Home
from torpor.runtime.joining import Aside
from torpor.runtime.leasing import is_held
from torpor.runtime.memory import limit_of
from torpor.runtime.owner import LEAVE_SECONDS, Owner
from torpor.runtime.staging import available_memory
from torpor.sandbox.fifos import Pulse

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
RETRY_SECONDS = 1.0
RETRY_SECONDS_MAX = 300.0
SPARE_MEMORY_BYTES = 512 << 20
"""Left to the rest of the machine."""
NEW_SESSION_BYTES = 256 << 20
"""What a session is taken to need before its first image tells."""
KERNEL_BYTES = 40 << 20
"""What a sandbox takes beside what a session's limit counts."""

Own = Callable[[SessionId, "Wish", Aside], AbstractAsyncContextManager[Owner]]


@dataclass(frozen=True, slots=True)
class Wish:
    """How a person wants a session to begin; see `Runtime.own`."""

    let_go: bool = False
    boot: bool = False


@dataclass(slots=True)
class Run:
    """One session that this node runs, or is about to.

    Attributes:
        owner: None until it is acquired.
        needs_bytes: memory that it will have taken when it lives, and has not yet.
        settled: set when it lives, or when it is clear that it does not.
    """

    owner: Owner | None = None
    needs_bytes: int = 0
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    task: "asyncio.Task[None] | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a session is not run now, though it is due.

    Attributes:
        times: how often in a row.
        not_before: when it is tried again, by the monotonic clock.
    """

    code: str
    reason: str
    times: int
    not_before: float


class Scheduler:
    """See the module.

    Args:
        own: acquires a session, and lets go of it at the end. If it has to wait for another session before, it stands
            aside: that one may be waiting for its place.
        starts_max: how many sessions begin at a time.
        idle_seconds_max: after so long with nothing to run, now or later, it stops; None: it does not.
    """

    def __init__(
        self,
        *,
        home: Home,
        database: Database,
        clock: Clock,
        own: Own,
        starts_max: int,
        idle_seconds_max: float | None = None,
    ) -> None:
        self._home = home
        self._database = database
        self._clock = clock
        self._own = own
        self._starts = asyncio.Semaphore(starts_max)
        self._wishes = self._looks = 0
        self._wished, self._looked, self._freed = Pulse(), Pulse(), Pulse()
        self._stopping = self._leaving = False
        self._idle_seconds_max = idle_seconds_max
        self._needed_at = clock.monotonic()
        self._how: dict[SessionId, Wish] = {}
        self.runs: dict[SessionId, Run] = {}
        self.failures: dict[SessionId, Failure] = {}

    def look(self) -> None:
        """There may be a session that is due."""
        self._wishes += 1
        self._wished.fire()

    async def start(self, session_id: SessionId, wish: Wish) -> None:
        """Begin a session that is due as somebody wishes, and wait until it lives.

        Raises:
            Conflict: it can't begin; its code and reason say why.
        """
        self.failures.pop(session_id, None)
        self._how[session_id] = wish
        before = self._looks
        self.look()
        while session_id not in self.runs and session_id not in self.failures:
            if self._looks > before + 1:  # Not the look that was under way.
                reason = "another node has it, or it has ended"
                raise Conflict("session_not_due", f"cannot start session {session_id}: {reason}")
            await self._looked.wait()
        if session_id in self.runs:
            await self.runs[session_id].settled.wait()
        failure = self.failures.get(session_id)
        if failure is not None:
            raise Conflict(failure.code, failure.reason)

    async def run(self) -> None:
        """Run what is due until `stop`; then put everything to sleep first."""
        async with asyncio.TaskGroup() as group:
            while not self._stopping:
                wishes, now = self._wishes, self._clock.wall_ns()
                for session in await self._database.read(lambda tx, now=now: sleeping.list_due(tx, now)):
                    if self._may_begin(session.session_id):
                        run = self.runs[session.session_id] = Run()
                        run.task = group.create_task(self._run(session.session_id, run))
                self._looks += 1
                self._looked.fire()
                await self._until_next(now, wishes)
            for run in list(self.runs.values()):
                group.create_task(self._retire(run))

    def stop(self) -> None:
        """Put every session to sleep, and end: those that ran go on with the next daemon."""
        self._stopping = True
        self.look()

    def leave(self) -> None:
        """End, and leave every sandbox as it is: the next daemon adopts it. An answer is waited for, not long."""
        self._leaving = True
        self.stop()

    def _may_begin(self, session_id: SessionId) -> bool:
        failure = self.failures.get(session_id)
        if failure is not None and self._clock.monotonic() < failure.not_before:
            return False
        return session_id not in self.runs and not is_held(self._home.lock(session_id))

    async def _until_next(self, now: int, wishes: int) -> None:
        """Wait until a session comes to its time, or for a wish beyond these; not for long, since some may get lost."""
        next_ns, sessions = await self._database.read(lambda tx: sleeping.next_wake(tx, now))
        waits = [LOOK_SECONDS] if next_ns is None else [LOOK_SECONDS, (next_ns - self._clock.wall_ns()) / 1e9]
        at = self._clock.monotonic()
        if sessions or self.runs:
            self._needed_at = at
        elif self._idle_seconds_max is not None and at - self._needed_at >= self._idle_seconds_max:
            self._stopping = True
            return
        waits += [failure.not_before - at for failure in self.failures.values() if failure.not_before > at]
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min(waits))):
                while self._wishes == wishes:
                    await self._wished.wait()

    async def _run(self, session_id: SessionId, run: Run) -> None:
        """One session, until it ends, or sleeps and needs no node for that."""
        try:
            await self._drive(session_id, run)
            self.failures.pop(session_id, None)
        except Exception as error:  # noqa: BLE001 - One session's fault, whatever it is, is not to end the others.
            first = innermost(error)
            if not isinstance(first, (Superseded, NotFound)):
                self._failed(session_id, first)
        finally:
            del self.runs[session_id]
            run.settled.set()
            self._freed.fire()
            self.look()

    async def _drive(self, session_id: SessionId, run: Run) -> None:
        async with AsyncExitStack() as place:
            await place.enter_async_context(self._starts)
            await self._wait_for_memory(session_id, run)
            if self._stopping:
                return
            wish = self._how.pop(session_id, Wish())
            own = self._own(session_id, wish, lambda: self._aside(session_id, run, place))
            async with own as owner, asyncio.TaskGroup() as tasks:
                if self._stopping:
                    return  # Who put the others to sleep did not see this one; the next daemon begins it.
                run.owner = owner
                tasks.create_task(self._settle(run, owner, place))
                await owner.run()

    @asynccontextmanager
    async def _aside(self, session_id: SessionId, run: Run, place: AsyncExitStack) -> AsyncGenerator[None]:
        """Give its place among those that begin, and the memory that it was promised, to others for as long."""
        run.needs_bytes = 0
        await place.aclose()
        self._freed.fire()
        yield
        await place.enter_async_context(self._starts)
        await self._wait_for_memory(session_id, run)

    async def _settle(self, run: Run, owner: Owner, place: AsyncExitStack) -> None:
        """Let the next one begin when this one lives."""
        await owner.begun.wait()
        run.needs_bytes = 0
        run.settled.set()
        await place.aclose()
        self._freed.fire()

    async def _wait_for_memory(self, session_id: SessionId, run: Run) -> None:
        """Until the machine has what the session will need, or nothing is left that could make room for it."""
        needs = await self._database.read(lambda tx: _needed_bytes(tx, session_id))
        while not self._stopping and any(other.needs_bytes or other.owner for other in self.runs.values()):
            promised = sum(other.needs_bytes for other in self.runs.values())
            if available_memory() - promised >= needs + SPARE_MEMORY_BYTES:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._freed.wait()
        run.needs_bytes = needs

    async def _retire(self, run: Run) -> None:
        """Put a session to sleep; one that can't be, or is to be left, is the next daemon's, with its sandbox."""
        if run.owner is None:
            return  # Who acquires it finds that it is to stop.
        await run.owner.leave(LEAVE_SECONDS)
        slept = not self._leaving and await run.owner.retire()
        if not slept and run.task is not None:
            run.task.cancel()

    def _failed(self, session_id: SessionId, error: BaseException) -> None:
        times = 1 + (self.failures[session_id].times if session_id in self.failures else 0)
        seconds = min(RETRY_SECONDS_MAX, RETRY_SECONDS * 2 ** (times - 1))
        code = error.code if isinstance(error, TorporError) else "node_failed"
        at = self._clock.monotonic() + seconds
        self.failures[session_id] = Failure(code=code, reason=str(error), times=times, not_before=at)
        trace = None if isinstance(error, TorporError) else error
        logger.error("session %s: %s; tried again in %.0f s", session_id, error, seconds, exc_info=trace)


def _needed_bytes(tx: Transaction, session_id: SessionId) -> int:
    """How much memory a session takes when it begins, as far as that is known."""
    newest = checkpoints.newest(tx, session_id)
    if newest is not None and newest.raw_bytes:
        # The image is staged in memory, and what it holds is in the sandbox as well.
        return 2 * newest.raw_bytes
    # A limit says what it may take at most, not that it will.
    limit = limit_of(tx, sessions.get(tx, session_id))
    return NEW_SESSION_BYTES if limit is None else min(NEW_SESSION_BYTES, limit + KERNEL_BYTES)
