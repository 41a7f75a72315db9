"""Owns one session from its lease on: brings it to life, keeps it alive, checkpoints it, and ends it.

The loop is: a rung of the ladder gives a life; the life goes on until the agent exits, the sandbox is lost, or somebody
asks to stop. A lost sandbox goes back to the ladder, with the gateway's pumps still running: killing only the sandbox
costs no second call. A node that was superseded writes nothing more and leaves the sandbox to its new owner.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from enum import Enum

from torpor.core.checkpoint import Checkpoint, cut_order
from torpor.core.clock import Clock
from torpor.core.crash import crash_point
from torpor.core.divergence import OnDivergence
from torpor.core.errors import Conflict, InvalidInput, MachineUnfit, SandboxFailed, TorporError, innermost
from torpor.core.events import EventDraft, Kind
from torpor.core.ids import SnapshotId, WaitpointId
from torpor.core.money import Account
from torpor.core.session import ENDED, SessionStatus
from torpor.core.waitpoint import ToldFile, Waitpoint
from torpor.db import sleeping
from torpor.db.roots import Move
from torpor.gateway.crossroads import Crossroads
from torpor.gateway.server import Gateway
from torpor.runtime.beginning import Beginning
from torpor.runtime.checkpointing import Checkpointer
from torpor.runtime.hibernation import Hibernation, Tier
from torpor.runtime.image_cache import ImageCache
from torpor.runtime.incarnation import Incarnation, Incarnations
from torpor.runtime.losses import Losses
from torpor.runtime.memory import Memory
from torpor.runtime.records import Records
from torpor.runtime.recovery import Ladder, Rung
from torpor.runtime.restarting import Restarting, describe_exit, exit_code
from torpor.runtime.staging import Staging
from torpor.runtime.watcher import Outcome, Watcher
from torpor.sandbox.streams import Stream, StreamGone

CHECKPOINT_AGE_SECONDS = 300
OUTPUT_DRAIN_SECONDS = 10
LEAVE_SECONDS = 60.0
"""An answer that is torn is paid for twice."""


class Ending(Enum):
    """Why a life is over."""

    EXITED = "exited"
    LOST = "lost"
    HIBERNATED = "hibernated"
    """It waits for what wakes it."""
    STOPPED = "stopped"
    KILLED = "killed"
    FULL = "full"
    RESTARTED = "restarted"
    DIVERGED = "diverged"
    """The agent left the log's path, and the policy is to fail."""


class Owner:
    """See the module.

    Attributes:
        records: its session's rows.
        begun: set when a life of its session has begun, or none will.
        ended: set when its work is done.
    """

    def __init__(
        self,
        *,
        records: Records,
        incarnations: Incarnations,
        ladder: Ladder,
        gateway: Gateway,
        crossroads: Crossroads,
        checkpointer: Checkpointer,
        staging: Staging,
        images: ImageCache,
        clock: Clock,
        watcher: Watcher,
        beginning: Beginning,
        hibernation: Hibernation,
        memory: Memory,
    ) -> None:
        self.records = records
        self._incarnations = incarnations
        self._ladder = ladder
        self._gateway = gateway
        self._crossroads = crossroads
        self._checkpointer = checkpointer
        self._staging = staging
        self._images = images
        self._clock = clock
        self._watcher = watcher
        self._beginning = beginning
        self._restarting = Restarting(records=records, restarts_max=beginning.spec.restarts_max, watcher=watcher)
        self._hibernation = hibernation
        self._memory = memory
        self._wake_ns: int | None = None
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self._wanted: Ending | None = None
        self._asked = asyncio.Event()
        self._stop_refused = asyncio.Event()
        self._life: Incarnation | None = None
        self._signals = 0
        self._early_signals: list[tuple[int, int]] = []

    @property
    def tier(self) -> Tier | None:
        """What is here of the session while it sleeps; None while it is awake."""
        return self._hibernation.tier

    async def run(self) -> Outcome:
        """Drive the session until it ends, is asked to stop, or sleeps and needs no node for that."""
        await asyncio.to_thread(self._staging.hold)
        try:
            async with asyncio.TaskGroup() as tasks:
                gateway = tasks.create_task(self._gateway.run())
                committer = tasks.create_task(self._checkpointer.commit_forever())
                outcome = await self._lives()
                self._gateway.close()
                committer.cancel()
                await gateway
        except* TorporError as failures:
            # One fault may fail several tasks; people and exit codes want the one that came first.
            raise innermost(failures) from failures
        finally:
            self._staging.let_go()
            self.begun.set()
            self.ended.set()
        await self._images.tend()
        return outcome

    def ask_to_stop(self, wake_ns: int | None = None) -> None:
        """Checkpoint, free the sandbox, leave the session until `wake_ns`; None: until a person resumes it."""
        self._wanted = self._wanted or Ending.STOPPED
        self._wake_ns = wake_ns
        self._asked.set()
        self._hibernation.call(None)

    async def stop(self) -> bool:
        """As `ask_to_stop`, and wait for the session to sleep or end; False: it can't be cut, and runs on."""
        self.ask_to_stop()
        return await self._stopped()

    async def retire(self) -> bool:
        """Sleep until this session's node daemon, or another one, is there again; as `stop`."""
        if self.tier is None:
            self.ask_to_stop(sleeping.NOW)
        else:
            self._hibernation.call(None)
        return await self._stopped()

    async def leave(self, deadline_seconds: float) -> None:
        """Wait for the moment to end a life, or leave it to another node: when no answer is arriving, if it comes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_seconds):
                await self._gateway.idleness.until_still()

    async def _stopped(self) -> bool:
        refused = self._stop_refused
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(self.ended.wait()), tasks.create_task(refused.wait())]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
        return self.ended.is_set()

    def ask_to_kill(self) -> None:
        """End the session for good."""
        self._wanted = Ending.KILLED
        self._asked.set()
        self._hibernation.call(None)

    async def hibernate(self) -> None:
        """Sleep until what the agent waits for comes; returns when the session sleeps.

        Raises:
            Conflict: `session_busy`: its agent does not only wait.
        """
        if self.tier is None:
            await self._hibernation.hurry()

    def wake(self) -> None:
        """A person wants the session awake, whatever it waits for."""
        self._hibernation.call("a person woke it")

    def let_go(self) -> None:
        """A person lets the agent take another path than the log's."""
        self._crossroads.go_on()

    async def forward_signal(self, number: int) -> None:
        """Send a signal to the agent's process group."""
        self._signals += 1
        wanted = (number, self._clock.wall_ns() + self._signals)
        self._hibernation.call(f"signal {number}")
        if self._life is None:
            self._early_signals.append(wanted)  # Its first output may be here before the life has begun.
        else:
            await self._life.link.signal(*wanted)

    async def work(self, worker: str) -> Stream:
        """Start a worker in the sandbox; its stream ends with this life, and is the caller's to reset and forget.

        Raises:
            Conflict: `session_between_lives`, and as `Link.work`.
        """
        self._hibernation.call("a command inside")
        if self._life is None:
            raise Conflict(
                "session_between_lives",
                f"cannot do this in session {self.records.session_id}: its sandbox is being made or restored",
                hint="Try again in a moment.",
            )
        self._signals += 1
        return await self._life.link.work(worker, self._clock.wall_ns() + self._signals)

    async def checkpoint(self, *, is_pinned: bool = False) -> Checkpoint | None:
        """Make a checkpoint now; None when it failed. That of a session that sleeps is there already."""
        if self.tier is not None:
            made = max(await self.records.checkpoints(), key=cut_order)
        else:
            await self._checkpointer.prepare()
            made = await self._checkpointer.take_and_commit("manual")
        if made is not None and is_pinned:
            await self.records.pin(made.number, is_pinned=True)
        return made

    def snapshots_in_use(self) -> set[SnapshotId]:
        """What a collector must leave as it is.

        Raises:
            SandboxFailed: `sandbox_gone`: it may be any of them, one is being restored.
        """
        if self._life is None:
            raise SandboxFailed("sandbox_gone", "cannot say which snapshots are in use: the session is recovering")
        return self._checkpointer.in_use()

    async def move(self, moves: Sequence[Move]) -> int:
        """Let checkpoints name their repacked snapshots; gives how many do."""
        return 0 if self._life is None else await self._checkpointer.move(moves)

    async def add_to_budget(self, amount_nanousd: int) -> Account:
        """Raise the budget and let go on what it held."""
        account = await self.records.add_to_budget(amount_nanousd)
        self._gateway.look_again()
        await self._wait_at_crossroads()
        return account

    async def resolve(self, point_id: WaitpointId, answer: str | None, files: Sequence[ToldFile] = ()) -> Waitpoint:
        """Resolve what the agent waits on, for a person, and let it go on."""
        point = await self.records.resolve(point_id, answer, files)
        self._gateway.look_again()
        return point

    async def deliver(self, text: str) -> int:
        """Send the agent a message; its number."""
        number = await self.records.deliver(text)
        self._gateway.look_again()
        return number

    async def _lives(self) -> Outcome:
        await self._memory.check_enough()
        await self._gateway.recover()
        rung = await self._ladder.adopt()
        await self._incarnations.sweep(keep=rung.life.number if rung else None)
        is_new = (await self.records.session()).status is SessionStatus.CREATED
        reason, losses = "started" if is_new else "resumed", Losses(self.records, self._clock)
        while True:
            if rung is None:
                rung = await self._climb(reason)
            ending = await self._live(rung)
            if ending is Ending.HIBERNATED:
                cause = await self._hibernation.sleep(rung.life)
                if cause is None:
                    return await self._end(self._wanted or ending, rung.life)
                reason, rung = cause, None
                continue
            if ending not in {Ending.LOST, Ending.RESTARTED}:
                return await self._end(ending, rung.life)
            reason = "the sandbox died" if ending is Ending.LOST else "the agent failed"
            if ending is Ending.LOST:
                await losses.add(rung.requested_at)
            else:
                losses.forget()
            await self.records.set_status(SessionStatus.RECOVERING, reason)
            await rung.life.sandbox.kill()
            # What was cut before the death is committed first: it is the newest point to go back to, and a commit amid
            # the next life would take that life's checkpoint number and leave it the wrong workspace to compare with.
            await self._checkpointer.settle()
            rung = None

    async def _climb(self, reason: str) -> Rung:
        session = await self.records.session()
        if session.status is SessionStatus.ASLEEP:
            await self.records.set_status(SessionStatus.WAKING, reason)
            crash_point("wake.begun")
        elif session.status not in (SessionStatus.CREATED, SessionStatus.WAKING):
            await self.records.set_status(SessionStatus.RECOVERING, reason)
        try:
            return await self._ladder.restore(reason)
        except MachineUnfit as error:
            if session.status in (SessionStatus.ASLEEP, SessionStatus.WAKING):
                await self.records.set_status(SessionStatus.ASLEEP, str(error))
            raise
        except SandboxFailed as error:
            if error.code == "session_lost":
                await self.records.set_status(SessionStatus.RECOVERING, reason)
                await self.records.set_status(SessionStatus.LOST, str(error))
                await self._incarnations.sweep(keep=None)
            raise

    async def _live(self, rung: Rung) -> Ending:
        """One life of the sandbox, from its first stream to its end."""
        life = rung.life
        ending = Ending.LOST
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(life.link.run())
                outputs = await self._beginning.begin(rung, tasks)
                self._life = life
                self.begun.set()
                while self._early_signals:
                    await life.link.signal(*self._early_signals.pop(0))
                tasks.create_task(self._accept(life, tasks))
                tasks.create_task(self._checkpoint_by_age())
                tasks.create_task(self._images.tend_forever())
                tasks.create_task(self._prepare_slot(life))
                if self._crossroads.policy is OnDivergence.ASK:
                    tasks.create_task(self._ask_at_crossroads())
                while True:
                    ending = await self._wait_for_ending(life, tasks)
                    if ending is Ending.EXITED and await self._restarting.decide(life.number, life.link):
                        ending = Ending.RESTARTED
                    if await self._conclude(ending, life, outputs):
                        _end_tasks()
        except* _LifeOver:
            pass
        except* InvalidInput:
            await life.sandbox.kill()
            raise
        except* SandboxFailed as failures:
            # One that is paused, and dies, only falls asleep faster.
            ending = Ending.HIBERNATED if self.tier is Tier.PAUSED else Ending.LOST
            reason = str(innermost(failures))
            ended = EventDraft(kind=Kind.INCARNATION_ENDED, incarnation=life.number, data={"reason": reason})
            await self.records.append(ended)
            self._watcher.notice(f"the sandbox died: {reason}")
            if ending is Ending.LOST and await self._memory.park_if_killed(life):
                ending = Ending.FULL
        finally:
            self._life = None
            self._checkpointer.end_life()
            self._hibernation.end_life()
            if life.watch is not None:
                life.watch.close()
        return ending

    async def _wait_for_ending(self, life: Incarnation, tasks: asyncio.TaskGroup) -> Ending:
        waiting = [
            tasks.create_task(_as(Ending.EXITED, life.link.wait_exit())),
            tasks.create_task(_as(Ending.STOPPED, self._asked.wait())),
            tasks.create_task(_as(Ending.FULL, self._memory.until_full(life))),
            tasks.create_task(_as(Ending.HIBERNATED, self._hibernation.until_idle(life))),
        ]
        if self._crossroads.policy is OnDivergence.FAIL:
            waiting.append(tasks.create_task(_as(Ending.DIVERGED, self._crossroads.reached())))
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        # The agent's exit counts for more than a wish, and a wish for more than idleness.
        ending = next(task for task in waiting if task.done()).result()
        for task in waiting:
            task.cancel()
        return self._wanted or ending if ending is Ending.STOPPED else ending

    async def _conclude(self, ending: Ending, life: Incarnation, outputs: Sequence[asyncio.Task[None]]) -> bool:
        """What has to happen while the link is still open; False when the session has to run on after all."""
        if ending in {Ending.EXITED, Ending.RESTARTED}:
            await asyncio.wait(outputs, timeout=OUTPUT_DRAIN_SECONDS)
            if ending is Ending.EXITED:
                await self._finish(life)
        elif ending is Ending.DIVERGED:
            pending = self._gateway.pending_redo()
            await self.records.fail_diverged(life.number, self._crossroads.what, pending)
            crash_point("divergence.failed")
            self._watcher.notice(f"failed: after its restore the agent took another path ({self._crossroads.what})")
        elif ending is Ending.HIBERNATED:
            return await self._hibernation.doze()
        elif ending is Ending.FULL:
            await self._memory.park(life)
        elif ending is Ending.STOPPED:
            return await self._stop()
        return True

    async def _stop(self) -> bool:
        """Make the last checkpoint; False when there is none, and the session runs on."""
        await self._checkpointer.prepare()
        await self.records.set_status(SessionStatus.HIBERNATING, "stopped by a person")
        async with AsyncExitStack() as still:
            if await self._checkpointer.take_last("stop", still) is not None:
                await self.records.stop(self._wake_ns)
                crash_point("session.asleep")
                still.pop_all()
                return True
        self._watcher.notice("not stopped: no checkpoint could be made, `torpor log` has the reason")
        await self.records.set_status(SessionStatus.RUNNING, "no checkpoint could be made")
        self._gateway.look_again()
        await self._wait_at_crossroads()
        self._wanted = None
        self._asked.clear()
        self._stop_refused.set()
        self._stop_refused = asyncio.Event()
        return False

    async def _accept(self, life: Incarnation, tasks: asyncio.TaskGroup) -> None:
        while True:
            stream: Stream = await life.link.accept()
            tasks.create_task(self._serve(stream, life.number))

    async def _serve(self, stream: Stream, incarnation: int) -> None:
        with contextlib.suppress(StreamGone):
            await self._gateway.serve(stream, incarnation=incarnation)

    async def _checkpoint_by_age(self) -> None:
        while True:
            age = self._clock.monotonic() - self._checkpointer.last_cut_at
            if age >= CHECKPOINT_AGE_SECONDS:
                await self._checkpointer.take("age")
                age = 0
            await asyncio.sleep(CHECKPOINT_AGE_SECONDS - age)

    async def _ask_at_crossroads(self) -> None:
        """Under the policy `ask`: the session waits, with its sandbox, until a person lets the held call go."""
        what = await self._crossroads.reached()
        await self._wait_at_crossroads()
        self._watcher.notice(f"waiting: the agent takes another path ({what}); `torpor resume --continue` lets it")
        await self._crossroads.decided()
        await self.records.go_on("a person let the agent take another path")

    async def _wait_at_crossroads(self) -> None:
        """The session waits while a call is held there, whatever else lets it run."""
        if self._crossroads.policy is OnDivergence.ASK and self._crossroads.holding:
            await self.records.wait(f"the agent takes another path than the log's: {self._crossroads.what}")

    async def _prepare_slot(self, life: Incarnation) -> None:
        """Have an empty sandbox ready for the next restore; without one a restore is slower, nothing else."""
        await self._checkpointer.first_commit()
        with contextlib.suppress(TorporError, OSError):
            await self._incarnations.prepare_slot(life)

    async def _end(self, ending: Ending, life: Incarnation) -> Outcome:
        """Free the sandbox; the session's rows already say what became of it, or are told now."""
        if ending is Ending.KILLED:
            await self.records.set_status(SessionStatus.CANCELLED, "killed by a person")
        elif ending is Ending.STOPPED:
            await self.records.stop(self._wake_ns)
        await life.sandbox.kill()
        await self._incarnations.sweep(keep=None)
        session = await self.records.session()
        if session.status in ENDED:
            self._staging.clear()
        return Outcome(status=session.status, exit_status=session.exit_status)

    async def _finish(self, life: Incarnation) -> None:
        """The agent exited: its final workspace, the exit and the status become durable together, then init may go.

        A kill -9 before the transaction leaves a sandbox whose init still holds the exit status; after it
        (`exit.committed`) a session that has ended, and a sandbox that the next sweep kills.
        """
        wait_status = await life.link.wait_exit()
        await self._checkpointer.settle()
        code = exit_code(wait_status)
        status = SessionStatus.SUCCEEDED if code == 0 else SessionStatus.FAILED
        async with self._checkpointer.lease() as lease:
            final = await self._checkpointer.final_files(life, lease)
            await asyncio.to_thread(lease.check)
            await self.records.end(status, code, final, describe_exit(wait_status))
        crash_point("exit.committed")
        life.link.acknowledge_exit()


class _LifeOver(Exception):
    pass


async def _as(ending: Ending, waited: Awaitable[object]) -> Ending:
    await waited
    return ending


def _end_tasks() -> None:
    """End the surrounding TaskGroup with everything in it."""
    raise _LifeOver
