"""A session whose checkpoints a test makes: real init and link, log, store and staging; only the sandbox is its own.

Its memory is what the test says, its pause stops the real init. Commits stand still where a test holds the store.
"""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.guests import NativeInit, build_init, native_init, running
from tests.unit.snapshots.making import IDS, KEY

from torpor.core.checkpoint import Checkpoint
from torpor.core.clock import SystemClock
from torpor.core.errors import MachineUnfit
from torpor.core.events import Event, Kind
from torpor.core.ids import CallId, NodeId, SessionId, new_session_id, new_snapshot_id
from torpor.core.pacing import EVERY_TURN_PPM
from torpor.core.redo import RedoSet
from torpor.core.retention import RetentionPolicy
from torpor.core.session import SessionStatus
from torpor.db import checkpoints, log, sessions
from torpor.db.database import Database, open_database
from torpor.gateway.server import Gateway
from torpor.runtime.checkpointing import Checkpointer
from torpor.runtime.cutting import files_checkpoint
from torpor.runtime.image_cache import MEMORY_DIRECTORY
from torpor.runtime.incarnation import Incarnation
from torpor.runtime.records import Records
from torpor.runtime.session_store import SessionStore
from torpor.runtime.staging import Staging
from torpor.sandbox.driver import SandboxPlan
from torpor.sandbox.frames import AgentSpec
from torpor.sandbox.link import Link
from torpor.sandbox.rootfs import directory_image
from torpor.snapshots.backend import LocalDirectory
from torpor.snapshots.capture import capture
from torpor.snapshots.store import SnapshotStore
from torpor.snapshots.watch import open_watch

CLOCK = SystemClock()
MEGABYTE = 1 << 20


class HeldStore(LocalDirectory):
    """A directory whose manifests are written when the test lets them; the one of the number `refused` never is."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.open = threading.Event()
        self.open.set()
        self.manifests = 0
        self.refused = 0
        self.reached = asyncio.Semaphore(0)
        self.condemned_read = asyncio.Semaphore(0)
        self._loop = asyncio.get_running_loop()

    def get(self, key: str) -> bytes:
        if key.startswith("condemned/"):
            self._loop.call_soon_threadsafe(self.condemned_read.release)
        return super().get(key)

    def put(self, key: str, data: bytes) -> bool:
        if key.startswith("manifests/"):
            self._loop.call_soon_threadsafe(self.reached.release)
            assert self.open.wait(60), "the test holds the store for good"
            self.manifests += 1
            if self.manifests == self.refused:
                raise MachineUnfit("no_space", "cannot write: the test says so")
        return super().put(key, data)


class OwnSandbox:
    """A sandbox whose memory is the test's, around a real init."""

    def __init__(self, plan: SandboxPlan, init: NativeInit) -> None:
        self.plan = plan
        self.memory = b"memory 0"
        self.open_files: frozenset[int] | None = frozenset()
        self.is_paused = False
        self._init = init

    @property
    def pins(self) -> dict[str, str]:
        return {"driver": "own"}

    async def start(self) -> None: ...

    async def restore(self, image_directory: Path) -> None:
        raise NotImplementedError

    async def pause(self) -> None:
        os.kill(self._init.process.pid, signal.SIGSTOP)
        self.is_paused = True

    async def resume(self) -> None:
        os.kill(self._init.process.pid, signal.SIGCONT)
        self.is_paused = False

    async def save_image(self, image_directory: Path) -> None:
        assert self.is_paused
        (image_directory / "pages.img").write_bytes(self.memory)

    def open_for_writing(self) -> frozenset[int] | None:
        return self.open_files

    def alive(self) -> bool:
        return self._init.process.poll() is None

    async def kill(self) -> None:
        self._init.process.kill()


@dataclass(kw_only=True)
class Stage:
    """A session with one life, whose checkpoints are made here."""

    checkpointer: Checkpointer
    sandbox: OwnSandbox
    life: Incarnation
    records: Records
    backend: HeldStore
    store: SessionStore
    snapshots: SnapshotStore
    staging: Staging
    first: Checkpoint
    tasks: asyncio.TaskGroup
    directory: Path
    _restored: int = field(default=0)

    @property
    def workspace(self) -> Path:
        return self.sandbox.plan.workspace

    @property
    def staged(self) -> int:
        """How many images are in memory."""
        return len(list(self.staging.root.iterdir()))

    def be(self, state: str) -> None:
        """Give memory and workspace this state."""
        self.sandbox.memory = state.encode()
        (self.workspace / "state").write_text(state)

    async def hold_a_commit(self) -> None:
        """Begin a commit that goes on when the store is opened."""
        self.backend.open.clear()
        assert await self.checkpointer.take("manual") is not None
        await self.backend.reached.acquire()

    async def cuts(self, count: int) -> None:
        """Wait until so many cuts were made."""
        while self.checkpointer._queue.newest < count:
            await self.checkpointer._queue.progress()

    async def events(self, *kinds: Kind) -> list[Event]:
        found = await self.records.database.read(lambda tx: log.events(tx, self.records.session_id))
        return [event for event in found if event.kind in kinds]

    async def numbers(self) -> list[int]:
        return [point.number for point in await self.records.checkpoints()]

    def restored(self, point: Checkpoint) -> tuple[str, str]:
        """What a restore of a checkpoint finds in memory and in the workspace."""
        self._restored += 1
        target = self.directory / f"restored-{self._restored}"
        (target / "workspace").mkdir(parents=True)
        self.store.restore_image(point, target / "image")
        self.store.restore_workspace(point, target / "workspace")
        return (target / "image/pages.img").read_text(), (target / "workspace/state").read_text()

    async def turn(self, number: int, lost_seconds: float = 0.0) -> None:
        """A model call whose first byte had been there for so long when it was let go."""
        await self.checkpointer.take_turn(CallId(f"call_{number}"), lambda: CLOCK.monotonic() - lost_seconds)


async def unused(*_arguments: Any) -> None:
    raise AssertionError("nobody calls this here")


@asynccontextmanager
async def stage(
    directory: Path, *, share_ppm: int = EVERY_TURN_PPM, memory: Path = MEMORY_DIRECTORY
) -> AsyncIterator[Stage]:
    session_id = new_session_id(CLOCK.wall_ns())
    database = await open_database(f"sqlite://{directory / 'torpor.db'}", clock=CLOCK)
    backend = HeldStore(directory / "store")
    snapshots = SnapshotStore(backend, IDS)
    store = SessionStore(snapshots, KEY, session_id, ())
    staging = Staging(directory, session_id, memory)
    staging.hold()
    try:
        records, first = await begin_session(database, session_id, store, directory)
        gateway = Gateway(
            database=database,
            session_id=session_id,
            owner_token=records.owner_token,
            clock=CLOCK,
            upstreams=(),
            on_call=unused,
            checkpoint_for=unused,
            spawn_for=unused,
        )
        await gateway.begin_incarnation(1, RedoSet(), adopted=False)
        checkpointer = Checkpointer(
            records=records,
            store=store,
            staging=staging,
            gateway=gateway,
            clock=CLOCK,
            share_ppm=share_ppm,
            retention=RetentionPolicy(keep_last=100, keep_hourly=0, keep_daily=0),
        )
        (directory / "init").mkdir()
        with native_init(build_init(), directory / "init") as init:
            fifos = {"to_guest": init.fifos.to_guest, "from_guest": init.fifos.from_guest}
            async with running(await Link.open(**fifos, clock=CLOCK)) as link, asyncio.TaskGroup() as tasks:
                agent = AgentSpec(arguments=("sleep", "600"), environment={"PATH": os.environ["PATH"]}, cwd="/")
                await link.start(agent, incarnation=1, wall_ns=CLOCK.wall_ns(), entropy=bytes(64))
                plan = SandboxPlan(
                    sandbox_id="own",
                    directory=directory,
                    image=directory_image(Path("/")),
                    workspace=directory / "workspace",
                    init_directory=directory,
                )
                sandbox = OwnSandbox(plan, init)
                life = Incarnation(number=1, sandbox=sandbox, link=link, tree=None, watch=open_watch())
                committing = tasks.create_task(checkpointer.commit_forever())
                await checkpointer.begin_life(life, first, next_number=1)
                yield Stage(
                    checkpointer=checkpointer,
                    sandbox=sandbox,
                    life=life,
                    records=records,
                    backend=backend,
                    store=store,
                    snapshots=snapshots,
                    staging=staging,
                    first=first,
                    tasks=tasks,
                    directory=directory,
                )
                backend.open.set()
                committing.cancel()
    finally:
        backend.open.set()
        staging.let_go()
        staging.clear()
        await database.close()


async def begin_session(
    database: Database, session_id: SessionId, store: SessionStore, directory: Path
) -> tuple[Records, Checkpoint]:
    """A session that runs, with its checkpoint 0."""
    (directory / "workspace").mkdir()
    (directory / "workspace/state").write_text("seed")
    (directory / "empty").mkdir()
    session = await database.write(
        lambda tx: sessions.create(tx, session_id=session_id, name=None, spec={}, wall_ns=CLOCK.wall_ns()),
        durable=True,
    )
    owner: dict[str, Any] = {"node_id": NodeId("node_test"), "boot_id": "boot", "pid": 1, "wall_ns": CLOCK.wall_ns()}
    token = await database.write(
        lambda tx: sessions.acquire(tx, session_id=session_id, seen_token=session.owner_token, **owner), durable=True
    )
    records = Records(database=database, session_id=session_id, owner_token=token, clock=CLOCK)
    aside = directory / "aside"
    aside.mkdir()
    async with store.lease() as lease:
        saved = store.save(
            image_dir=directory / "empty",
            workspace=capture(directory / "workspace", aside),
            parent=None,
            pins={},
            snapshot_id=new_snapshot_id(CLOCK.wall_ns()),
            lease=lease,
        )
    seq, cursor_seq = await records.position()
    about: dict[str, Any] = {"session_id": session_id, "number": 0, "seq": seq, "cursor_seq": cursor_seq}
    point = files_checkpoint(saved, **about, incarnation=0, reason="start", wall_ns=CLOCK.wall_ns())
    fence: dict[str, Any] = {"session_id": session_id, "owner_token": token, "wall_ns": CLOCK.wall_ns()}
    first = await database.write(lambda tx: checkpoints.commit(tx, **fence, checkpoint=point), durable=True)
    await records.begin_incarnation(1, first, "boot", "started")
    await records.set_status(SessionStatus.RUNNING)
    return records, first
