"""Puts a session to sleep whose agent only waits, and says when it is to wake (RECOVERY section 8).

A sleeping session goes down the tiers: paused in memory; its image and an empty sandbox ready for it; the image alone,
as long as the cache has room for it; the store. Order, and what a kill -9 between any two steps leaves:

    status `hibernating`
        `hibernate.begun`      a session that recovers: its sandbox is adopted
    the last cut: the sandbox stands still from here on; its commit
        (as any checkpoint)    the sandbox is paused, with its mark: adopted and resumed
    one transaction: status `asleep` and when it wakes, unless something came since the cut
        `session.asleep`       a paused sandbox of a session that sleeps; the next owner kills it and restores
    the sandbox is destroyed
        `hibernate.freed`      a session that sleeps; its next owner wakes it when it is due

    waking: status `waking`
        `wake.begun`           a session that wakes: it is due still, the next owner climbs the ladder
    from the pause the sandbox runs on, else a rung of the ladder: as any recovery
    one transaction: status `running`, and due all the time if no person attends it
"""

import asyncio
import shutil
from contextlib import AsyncExitStack, suppress
from enum import StrEnum

from torpor.core.checkpoint import Checkpoint
from torpor.core.clock import Clock
from torpor.core.crash import crash_point
from torpor.core.errors import Conflict
from torpor.core.idling import Linger, Tiers
from torpor.core.session import SessionStatus
from torpor.db.sleeping import NOW
from torpor.gateway.idleness import Waiting
from torpor.gateway.server import Gateway
from torpor.runtime.checkpointing import Checkpointer
from torpor.runtime.image_cache import memory_is_short
from torpor.runtime.incarnation import Incarnation, Incarnations
from torpor.runtime.records import Records
from torpor.runtime.staging import Staging
from torpor.runtime.watcher import Watcher

BUSY_SHARE = 0.03
"""Of one processor: an agent that uses more while its calls wait is doing something on its own."""
LOOK_AT_MEMORY_SECONDS = 15.0


class Tier(StrEnum):
    """What is left of a sleeping session in memory."""

    PAUSED = "paused"
    """All of it; it stands still."""
    READY = "ready"
    """Its image, and an empty sandbox to restore it into."""
    STORED = "store"
    """Nothing that anybody keeps for it; its image, as long as the cache has room."""

    @property
    def keeps_something(self) -> bool:
        return self is not Tier.STORED


class Hibernation:
    """One owner's: when its session sleeps, in which tier, and what wakes it.

    Attributes:
        tier: None while it is awake.
    """

    def __init__(
        self,
        *,
        records: Records,
        gateway: Gateway,
        checkpointer: Checkpointer,
        incarnations: Incarnations,
        staging: Staging,
        tiers: Tiers,
        clock: Clock,
        watcher: Watcher,
        attended: bool,
    ) -> None:
        self._records = records
        self._gateway = gateway
        self._checkpointer = checkpointer
        self._incarnations = incarnations
        self._staging = staging
        self._tiers = tiers
        self._clock = clock
        self._watcher = watcher
        self._attended = attended
        self._linger = Linger(tiers.linger_seconds or 0.0)
        self._waiting: Waiting | None = None
        self._called = asyncio.Event()
        self._cause = ""
        self._asleep_at = 0.0
        self._hurrying: list[asyncio.Future[bool]] = []
        self.tier: Tier | None = None

    def call(self, cause: str | None) -> None:
        """End the sleep, if there is one: wake for a cause, or (None) leave the session asleep."""
        self._cause = cause or ""
        self._called.set()

    async def until_idle(self, life: Incarnation) -> None:
        """Wait until the agent has been idle for as long as it takes."""
        idleness = self._gateway.idleness
        while True:
            moves, waiting = idleness.moves, self._gateway.waiting()
            if self._hurrying:
                return
            needed = None if waiting is None or self._tiers.linger_seconds is None else self._needed(waiting)
            before = None if needed is None else await asyncio.to_thread(life.sandbox.cpu_seconds)
            with suppress(TimeoutError):
                async with asyncio.timeout(needed):
                    while idleness.moves == moves:
                        await idleness.moved.wait()
            if needed is None or idleness.moves != moves or life.link.works:
                continue
            after = await asyncio.to_thread(life.sandbox.cpu_seconds)
            is_busy = before is None or after is None or after - before > BUSY_SHARE * needed
            if not is_busy and self._gateway.waiting() is not None:
                return

    async def hurry(self) -> None:
        """Go to sleep without being idle for long.

        Raises:
            Conflict: `session_busy`: the agent does not only wait, or can't be cut.
        """
        outcome: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self._gateway.waiting() is not None:
            self._hurrying.append(outcome)
            self._gateway.idleness.move()
        else:
            outcome.set_result(False)
        if not await outcome:
            raise Conflict(
                "session_busy",
                f"cannot hibernate session {self._records.session_id}: its agent does not only wait, or can't be cut",
                hint="`torpor stop` puts it to sleep whatever it does; only `torpor resume` wakes it then.",
            )

    def end_life(self) -> None:
        """The sandbox is gone; nobody goes to sleep in it any more."""
        self._tell_hurrying(slept=False)

    def _needed(self, waiting: Waiting) -> float | None:
        left = None if waiting.due_ns is None else (waiting.due_ns - self._clock.wall_ns()) / 1e9
        return self._linger.needed(left_seconds=left, for_others=waiting.for_others)

    async def doze(self) -> bool:
        """Put an idle session to sleep, and keep its sandbox for a while; False: it runs on in it.

        True leaves the sandbox paused, for `sleep` to destroy.
        """
        await self._checkpointer.prepare()
        self._waiting = waiting = self._gateway.waiting()
        if waiting is None:
            self._tell_hurrying(slept=False)
            return False
        self._called.clear()
        began = self._clock.monotonic()
        await self._records.set_status(SessionStatus.HIBERNATING, "its agent only waits")
        crash_point("hibernate.begun")
        async with AsyncExitStack() as still:
            made = await self._checkpointer.take_last("hibernate", still)
            if made is not None and await self._fall_asleep(made, waiting):
                crash_point("session.asleep")
                self._linger.cost_seconds = 2 * (self._clock.monotonic() - began)
                self._watcher.notice("asleep until what the agent waits for comes")
                self.tier, self._asleep_at = Tier.PAUSED, self._clock.monotonic()
                self._tell_hurrying(slept=True)
                cause = await self._until_called(waiting, self._tiers.paused_seconds)
                if cause is None:
                    still.pop_all()
                    return True
                await self._wake(cause)
            else:
                self._linger.slept(0)
                self._tell_hurrying(slept=False)
        reason = "no checkpoint could be made" if made is None else "what its agent waited for came"
        await self._records.run(reason, attended=self._attended)
        self._gateway.look_again()
        return False

    def _tell_hurrying(self, *, slept: bool) -> None:
        while self._hurrying:
            outcome = self._hurrying.pop()
            if not outcome.done():
                outcome.set_result(slept)

    async def _fall_asleep(self, made: Checkpoint, waiting: Waiting) -> bool:
        # An answer that is on its way to this node needs a node that goes for it again if this one dies.
        at_latest = NOW if waiting.for_others and not self._attended else None
        return await self._records.fall_asleep(made, at_latest)

    async def sleep(self, life: Incarnation) -> str | None:
        """Free the sandbox of a session that is asleep, and what else it has here by and by.

        Returns:
            Why it wakes; None: it sleeps on, without this node.
        """
        await life.sandbox.kill()
        await asyncio.to_thread(shutil.rmtree, life.plan.directory, ignore_errors=True)
        crash_point("hibernate.freed")
        waiting = self._waiting
        assert waiting is not None, "it was asleep before"
        self.tier = Tier.READY
        cause = await self._until_called(waiting, self._tiers.ready_seconds)
        if cause is None and not self._called.is_set():
            await self._incarnations.drop_slot()
            await asyncio.to_thread(self._staging.let_go)
            self.tier = Tier.STORED
            if self._attended or self._gateway.idleness.fetching:
                cause = await self._until_called(waiting, None)
            await asyncio.to_thread(self._staging.hold)
        if cause is not None:
            await self._wake(cause)
        return cause

    async def _wake(self, cause: str) -> None:
        """It wakes; whoever owns it next does as well, if this node dies."""
        self.tier = None
        self._linger.slept(self._clock.monotonic() - self._asleep_at)
        await self._records.set_status(SessionStatus.WAKING, cause)
        crash_point("wake.begun")

    async def _until_called(self, waiting: Waiting, seconds: float | None) -> str | None:
        """Why to wake; None: the time is over, or memory is short, or it is to stay asleep."""
        async with asyncio.TaskGroup() as group:
            news = group.create_task(waiting.news())
            called = group.create_task(self._called.wait())
            over = group.create_task(self._time_to_go(seconds))
            await asyncio.wait((news, called, over), return_when=asyncio.FIRST_COMPLETED)
            came = news.done()
            for task in (news, called, over):
                task.cancel()
        if self._called.is_set():
            return self._cause or None
        return "what its agent waited for came" if came else None

    async def _time_to_go(self, seconds: float | None) -> None:
        """Return when a tier has lasted for long enough, earlier if memory is short."""
        if seconds is None:
            await asyncio.Event().wait()
            return
        until = self._clock.monotonic() + seconds
        # The kernel's count of who waits for memory can only be looked at.
        while (left := until - self._clock.monotonic()) > 0 and not memory_is_short():  # noqa: ASYNC110
            await asyncio.sleep(min(left, LOOK_AT_MEMORY_SECONDS))
