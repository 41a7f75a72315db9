"""Brings a session's sandbox to the point where its link answers: boots, restores and adopts; sweeps what is left over.

It touches no log. Who calls it has made the incarnation's number durable first, so that whatever a crash leaves here is
found by its number and killed or adopted, never lost.
"""

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from torpor.core.checkpoint import Checkpoint
from torpor.core.clock import Clock
from torpor.core.errors import SandboxFailed, TorporError
from torpor.core.ids import SessionId
from torpor.core.pins import IMAGE, Pins, check_pins
from torpor.runtime.home import Home
from torpor.runtime.session_store import SessionStore
from torpor.runtime.spec import SessionSpec, sandbox_id, sandbox_plan
from torpor.runtime.staging import Staging
from torpor.sandbox.driver import Driver, Drivers, Sandbox, SandboxPlan
from torpor.sandbox.link import Link
from torpor.snapshots.capture import watch_tree
from torpor.snapshots.lease import Lease
from torpor.snapshots.tree import TreeIndex
from torpor.snapshots.watch import DirectoryWatch, open_watch

logger = logging.getLogger(__name__)

HELLO_DEADLINE_SECONDS = 30
PAUSED_HELLO_DEADLINE_SECONDS = 3
UNBORN_HELLO_DEADLINE_SECONDS = 3
SANDBOXES_TRIED_MAX = 3
"""So many sandboxes may die of one checkpoint before it is held to be at fault."""


class _Died(Exception):
    """A sandbox is gone that was being made or filled, which shows as some failure or other."""

    def __init__(self, failure: SandboxFailed) -> None:
        super().__init__(str(failure))
        self.failure = failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Incarnation:
    """One life of the sandbox, with the link open."""

    number: int
    sandbox: Sandbox
    link: Link
    tree: TreeIndex | None
    """What the workspace held at the beginning, so that the first capture reads only what changed; None: unknown."""
    watch: DirectoryWatch | None
    """Spares captures from looking at all files; None: the machine has no more."""

    @property
    def plan(self) -> SandboxPlan:
        return self.sandbox.plan

    @property
    def pins(self) -> Pins:
        """What an image of it needs to be restored."""
        return {**self.sandbox.pins, IMAGE: self.plan.image.digest}

    @property
    def paused_mark(self) -> Path:
        """There while this node may have the sandbox paused."""
        return paused_mark(self.plan)

    @property
    def clones(self) -> Path:
        """Where captures put clones of big files, on the workspace's file system; outside of the sandbox's sight."""
        return self.plan.directory / "clones"


def paused_mark(plan: SandboxPlan) -> Path:
    return plan.directory / "paused"


class Incarnations:
    """Makes and finds the incarnations of one session."""

    def __init__(
        self,
        *,
        home: Home,
        session_id: SessionId,
        spec: SessionSpec,
        drivers: Drivers,
        store: SessionStore,
        staging: Staging,
        clock: Clock,
    ) -> None:
        self._home = home
        self._session_id = session_id
        self._spec = spec
        self._drivers = drivers
        self._store = store
        self._staging = staging
        self._clock = clock
        self._slot: Sandbox | None = None
        self._slot_number = 0

    def lease(self) -> contextlib.AbstractAsyncContextManager[Lease]:
        """Hold it around `boot` and `restore`, from before the rows of their checkpoints are read."""
        return self._store.lease()

    async def boot(self, number: int, checkpoint: Checkpoint) -> Incarnation:
        """A fresh sandbox with the checkpoint's workspace; its init waits for START."""

        async def start(sandbox: Sandbox) -> Incarnation:
            tree, watch = await self._fill_workspace(sandbox.plan, checkpoint)
            await sandbox.start()
            return await self._connect(number, sandbox, tree, watch)

        return await self._fill(number, self._drivers.present, start)

    async def restore(self, number: int, checkpoint: Checkpoint) -> Incarnation:
        """A sandbox from the checkpoint's image and workspace; its init waits for RESTORED.

        Raises:
            Damaged: the snapshot's bytes are not what was stored.
            PinsUnmet: this machine lacks what the image needs.
            SandboxFailed: the driver refused the image, or init did not answer.
        """
        driver = await asyncio.to_thread(self._driver_for, checkpoint)
        async with asyncio.TaskGroup() as both:
            staging = both.create_task(self._image(checkpoint))

            async def load(sandbox: Sandbox) -> Incarnation:
                tree, watch = await self._fill_workspace(sandbox.plan, checkpoint)
                await sandbox.restore(await staging)
                return await self._connect(number, sandbox, tree, watch)

            living = both.create_task(self._fill(number, driver, load))
        return living.result()

    def _driver_for(self, checkpoint: Checkpoint) -> Driver:
        """The driver that can restore an image, which is bound to what wrote it and to the machine's kind."""
        pinned = self._store.pins(checkpoint)
        driver = self._drivers.for_image(pinned)
        check_pins(f"checkpoint {checkpoint.number}", pinned, {**driver.pins, IMAGE: self._spec.image.digest})
        return driver

    async def adopt(self, number: int, *, has_lived: bool) -> Incarnation | None:
        """The living sandbox of that number with a new link; None when there is none to speak to.

        Args:
            has_lived: a node had begun to run it. Of another one there may be processes and nobody in them who
                answers, ever; and it has done nothing that is not done again.
        """
        plan = sandbox_plan(self._home, self._session_id, self._spec, number)
        sandbox = self._drivers.of_sandbox(plan).find(plan)
        if sandbox is None or not await asyncio.to_thread(sandbox.alive):
            return None
        mark = paused_mark(sandbox.plan)
        watch = open_watch()
        try:
            if not mark.exists():
                seconds = HELLO_DEADLINE_SECONDS if has_lived else UNBORN_HELLO_DEADLINE_SECONDS
                return await self._connect(number, sandbox, None, watch, seconds)
            # The last node died around a pause. Resuming a kernel that is not paused would crash it, so ask first.
            with contextlib.suppress(SandboxFailed):
                found = await self._connect(number, sandbox, None, watch, PAUSED_HELLO_DEADLINE_SECONDS)
                mark.unlink()
                return found
            await sandbox.resume()
            mark.unlink()
            return await self._connect(number, sandbox, None, watch)
        except SandboxFailed:
            return None

    async def prepare_slot(self, life: Incarnation) -> None:
        """Make a warm slot, an empty sandbox that is ready to be restored into, for the incarnation after this one."""
        if self._slot is None:
            number = life.number + 1
            self._slot = await self._create(number, self._drivers.for_image(life.pins))
            self._slot_number = number

    async def sweep(self, keep: int | None) -> None:
        """Kill every sandbox of this session but one, and delete the directories of incarnations that are gone."""
        await sweep(self._home, self._session_id, self._spec, self._drivers.present, keep)
        self._slot = None

    async def drop_slot(self) -> None:
        """Free the warm slot."""
        slot, self._slot = self._slot, None
        if slot is not None:
            await slot.kill()
            await asyncio.to_thread(shutil.rmtree, slot.plan.directory, ignore_errors=True)

    async def _take_slot(self, number: int, driver: Driver) -> Sandbox | None:
        """The warm slot, if it is this number's and driver's and alive."""
        slot, self._slot = self._slot, None
        fits = slot is not None and self._slot_number == number and slot.pins == driver.pins
        return slot if slot is not None and fits and await asyncio.to_thread(slot.alive) else None

    async def _fill(
        self, number: int, driver: Driver, bring_to_life: Callable[[Sandbox], Awaitable[Incarnation]]
    ) -> Incarnation:
        """Bring a checkpoint to life in an empty sandbox: the warm slot if there is one, else a new one.

        A sandbox that dies meanwhile is no fault of the checkpoint's: what killed it was meant for a process. So the
        same goes into a new one. An image that kills whatever it is loaded into has a fault, hence not for ever.

        Raises:
            SandboxFailed: it lives and refuses, or it died again and again.
        """
        for _ in range(SANDBOXES_TRIED_MAX - 1):
            try:
                return await self._fill_one(number, driver, bring_to_life)
            except _Died as died:
                logger.warning("a sandbox died while it was filled, another one is taken: %s", died.failure)
        try:
            return await self._fill_one(number, driver, bring_to_life)
        except _Died as died:
            raise died.failure from died

    async def _fill_one(
        self, number: int, driver: Driver, bring_to_life: Callable[[Sandbox], Awaitable[Incarnation]]
    ) -> Incarnation:
        """Raises:
        _Died: the sandbox died.
        """
        try:
            sandbox = await self._take_slot(number, driver) or await self._create(number, driver)
        except SandboxFailed as failure:
            raise _Died(failure) from failure
        async with self._undone_on_failure(sandbox):
            try:
                return await bring_to_life(sandbox)
            except SandboxFailed as failure:
                # A kernel that dies lets go of its FIFOs before it lets go of the socket at which it is asked.
                if failure.code != "link_lost" and await asyncio.to_thread(sandbox.alive):
                    raise
                raise _Died(failure) from failure

    async def _create(self, number: int, driver: Driver) -> Sandbox:
        plan = sandbox_plan(self._home, self._session_id, self._spec, number)
        leftover = driver.find(plan)
        if leftover is not None:
            await leftover.kill()
        await asyncio.to_thread(shutil.rmtree, plan.directory, ignore_errors=True)
        plan.workspace.mkdir(parents=True, mode=0o700)
        return await driver.create(plan)

    async def _fill_workspace(
        self, plan: SandboxPlan, checkpoint: Checkpoint
    ) -> tuple[TreeIndex, DirectoryWatch | None]:
        """Write the workspace's files, and watch them from before anything runs."""
        tree = await asyncio.to_thread(self._store.restore_workspace, checkpoint, plan.workspace)
        watch = open_watch()
        if watch is not None:
            tree = await asyncio.to_thread(watch_tree, plan.workspace, tree, watch)
        return tree, watch

    async def _image(self, checkpoint: Checkpoint) -> Path:
        """The image in memory: still there, or rebuilt from the store."""
        cached = self._staging.cached(checkpoint.snapshot_id, checkpoint.raw_bytes)
        return cached or await self._rebuild(checkpoint)

    async def _rebuild(self, checkpoint: Checkpoint) -> Path:
        """Write the image from the store into memory; kept there for the next restore."""
        snapshot_id = checkpoint.snapshot_id
        # Nothing else is on its way, and what is staged of other snapshots is no use to anybody.
        await asyncio.to_thread(self._staging.keep_only, ())
        await asyncio.to_thread(self._staging.begin, snapshot_id, checkpoint.raw_bytes)
        target = self._staging.image(snapshot_id)
        await asyncio.to_thread(self._store.restore_image, checkpoint, target)
        self._staging.discard_changes(snapshot_id)
        self._staging.complete(snapshot_id)
        return target

    async def _connect(
        self,
        number: int,
        sandbox: Sandbox,
        tree: TreeIndex | None,
        watch: DirectoryWatch | None,
        deadline_seconds: float = HELLO_DEADLINE_SECONDS,
    ) -> Incarnation:
        link = await Link.open(
            to_guest=sandbox.plan.to_guest,
            from_guest=sandbox.plan.from_guest,
            clock=self._clock,
            deadline_seconds=deadline_seconds,
        )
        return Incarnation(number=number, sandbox=sandbox, link=link, tree=tree, watch=watch)

    @contextlib.asynccontextmanager
    async def _undone_on_failure(self, sandbox: Sandbox):
        try:
            yield
        except (TorporError, OSError, asyncio.CancelledError, _Died):
            await _kill(sandbox)
            raise


async def _kill(sandbox: Sandbox) -> None:
    """Destroy it, even when the task that made it is cancelled."""
    await asyncio.shield(asyncio.ensure_future(sandbox.kill()))


async def sweep(home: Home, session_id: SessionId, spec: SessionSpec, driver: Driver, keep: int | None) -> None:
    """Kill every sandbox of a session but one, and delete the directories of incarnations that are gone."""
    prefix = sandbox_id(session_id, 0).removesuffix("0")
    for name in driver.sandbox_ids():
        number = name.removeprefix(prefix)
        if name.startswith(prefix) and number.isdigit() and int(number) != keep:
            leftover = driver.find(sandbox_plan(home, session_id, spec, int(number)))
            if leftover is not None:
                await leftover.kill()
    await asyncio.to_thread(_sweep_directories, home.incarnation(session_id, 0).parent, keep)


def _sweep_directories(parent: Path, keep: int | None) -> None:
    for directory in parent.iterdir() if parent.is_dir() else ():
        if directory.name != str(keep):
            shutil.rmtree(directory, ignore_errors=True)


def fresh_entropy() -> bytes:
    """64 bytes for the guest's kernel and its after-restore hooks."""
    return os.urandom(64)
