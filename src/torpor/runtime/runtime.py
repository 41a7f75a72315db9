"""The runtime's public verbs: create, run (own), pull, diff, remove. The CLI and the node call nothing below it."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from torpor.config import (
    PriceRule,
    Upstream,
    read_prices,
    read_retention,
    read_starts_max,
    read_store,
    read_tiers,
    read_upstreams,
    read_workspace_bytes_max,
    torpor_home,
)
from torpor.core.checkpoint import Checkpoint, cut_order
from torpor.core.clock import Clock
from torpor.core.crash import crash_point
from torpor.core.errors import Conflict, InvalidInput, MachineUnfit
from torpor.core.idling import Tiers
from torpor.core.ids import NodeId, SessionId, new_session_id
from torpor.core.retention import RetentionPolicy
from torpor.core.session import ENDED, SessionStatus
from torpor.db import ahead, checkpoints, keys, redaction, sessions
from torpor.db.ahead import Ahead
from torpor.db.database import Database, Transaction, open_database
from torpor.runtime import leasing, redacting, seeding, transfer, workspaces
from torpor.runtime.holding import Ask, Holding
from torpor.runtime.home import Home
from torpor.runtime.image_cache import open_image_cache
from torpor.runtime.joining import Aside, take_answers
from torpor.runtime.master_key import MasterKeys
from torpor.runtime.reader import Reader
from torpor.runtime.records import Records
from torpor.runtime.request import Request, make_spec
from torpor.runtime.session_store import SessionStores
from torpor.runtime.spec import SessionSpec
from torpor.runtime.staging import Staging
from torpor.runtime.storage import open_blobs, open_configured, ready_or_down
from torpor.sandbox import rootfs
from torpor.sandbox.drivers import GvisorDrivers
from torpor.sandbox.gvisor import Runsc
from torpor.sandbox.tools import find_runsc, keep_runsc
from torpor.snapshots.backend import Backend
from torpor.snapshots.diff import Change
from torpor.snapshots.materialize import ExportReport
from torpor.snapshots.shared import drop_shared

if TYPE_CHECKING:
    # What drives a session takes half a second to import; most commands only read.
    from torpor.runtime.collecting import CollectOptions, CollectReport
    from torpor.runtime.owner import Owner
    from torpor.runtime.watcher import Watcher
    from torpor.snapshots.collect import Progress

SPARE_BYTES = 4 << 20  # Left free by what is stored, for the event log, which is on the same disk.


class Runtime(Reader):
    """One process's access to TORPOR_HOME. Build it with `open_runtime`."""

    def __init__(
        self,
        *,
        home: Home,
        upstreams: Sequence[Upstream],
        prices: Sequence[PriceRule],
        retention: RetentionPolicy,
        tiers: Tiers,
        starts_max: int,
        database: Database,
        backend: Backend,
        blobs: Backend,
        stores: SessionStores,
        clock: Clock,
    ) -> None:
        super().__init__(home=home, database=database, clock=clock)
        self.upstreams = upstreams
        self.prices = prices
        self.retention = retention
        self.tiers = tiers
        self.starts_max = starts_max
        self.images = open_image_cache(home.root, clock)
        self.backend = backend
        self.blobs = blobs
        self.stores = stores

    async def create(self, request: Request, caller: Mapping[str, str]) -> sessions.Session:
        """Record a new session and its checkpoint 0: the seeded workspace, before the agent starts.

        A kill -9 before the last transaction leaves a session without a checkpoint, which `rm` removes.

        Raises:
            InvalidInput, Conflict, MachineUnfit: something of the request can't be used.
        """
        if not request.argv:
            raise InvalidInput("command_empty", "cannot run a session: no command was given", hint="torpor run -- CMD")
        source = workspaces.check_source(request.workspace, Path.home(), self.home.root)
        environments = await asyncio.to_thread(self._environments, request, caller)
        inside = tuple(os.fsencode(path.relative_to(source)) for path in environments if path.is_relative_to(source))
        if not request.any_size:
            bytes_max = read_workspace_bytes_max(self.home.root)
            await asyncio.to_thread(workspaces.check_size, source, inside, bytes_max)
        spec = await asyncio.to_thread(make_spec, request, source, environments, caller, self.home)
        await asyncio.to_thread(self.backend.ready)
        session_id = new_session_id(self.clock.wall_ns())
        plain = msgspec.to_builtins(spec)
        key, kept = (await self.stores.keyring(anew=True)).new_session_key(session_id)

        def record(tx: Transaction) -> sessions.Session:
            created = sessions.create(
                tx,
                session_id=session_id,
                name=request.name,
                spec=plain,
                wall_ns=self.clock.wall_ns(),
                budget_nanousd=request.budget_nanousd,
            )
            keys.add_session(tx, session_id=session_id, owner_token=created.owner_token, key=kept)
            return created

        session = await self.database.write(record, durable=True)
        store = await self.stores.with_key(session_id, spec, key)
        async with store.lease() as lease:
            point = await asyncio.to_thread(seeding.seed, self.home, session, source, inside, store, lease, self.clock)
            await self.database.write(
                lambda tx: checkpoints.commit(
                    tx,
                    session_id=session_id,
                    owner_token=session.owner_token,
                    checkpoint=point,
                    wall_ns=self.clock.wall_ns(),
                ),
                durable=True,
            )
        return session

    @contextlib.asynccontextmanager
    async def own(
        self,
        session_id: SessionId,
        me: leasing.Holder,
        answers: leasing.HolderAnswers,
        watcher: "Watcher",
        *,
        attended: bool = True,
        let_go: bool = False,
        boot: bool = False,
        aside: Aside = contextlib.nullcontext,
    ) -> AsyncGenerator["Owner"]:
        """Acquire the session: lock first, then the token. Let go of both at the end.

        Args:
            attended: a person's process is its node; else a node daemon is to run it whenever none does.
            let_go: a person lets the agent take another path than the log's.
            boot: a person gives up the agent's memory, if its sandbox does not live.
            aside: the session is in there as long as it waits for another one, before this yields.

        Raises:
            Conflict: `session_running`, `session_ended`.
        """
        from torpor.runtime.owning import make_owner

        session = await self.session(session_id)
        if session.status in ENDED:
            await self._tidy(session, me, answers)
            raise Conflict(
                "session_ended",
                f"cannot resume session {session_id}: it has {session.status}",
                hint="`torpor log SESSION` shows its past, `torpor pull SESSION` brings its files.",
            )
        if await self.database.read(lambda tx: tx.one("transfer/find_checkpoint", session_id=session_id)) is None:
            raise Conflict(
                "session_without_checkpoint",
                f"cannot resume session {session_id}: it has no checkpoint",
                hint="An imported session is there to be read: torpor turns, torpor turn, torpor search.",
            )
        store = await self.stores.of(session)  # Without its key a session stays as it is: nothing is acquired yet.
        runsc = await self.runsc()
        try:
            await asyncio.to_thread(keep_runsc, runsc, self.home.tools)
        except OSError as error:  # Needed by none but a later restore, after somebody has replaced the original.
            reason = error.strerror or error
            watcher.notice(f"runsc cannot be kept for this session's images, do not remove {runsc.path}: {reason}")
        await ready_or_down(self.backend, watcher.notice)
        lock = await leasing.acquire_lock(session_id, self.home.lock(session_id), me, answers=answers)
        try:
            seen = await self.session(session_id)
            token = await self.database.write(lambda tx: self._acquire(tx, seen, me), durable=True)
            with contextlib.suppress(MachineUnfit):  # A store that is down keeps what is left over for the next owner.
                await ahead.sweep(self.database, session_id)
            records = Records(database=self.database, session_id=session_id, owner_token=token, clock=self.clock)
            if seen.parent is not None:
                await take_answers(records, self.home, watcher.notice, aside)
            yield make_owner(self, records, seen, store, runsc, watcher, attended=attended, let_go=let_go, boot=boot)
            await records.release()
        finally:
            lock.release()

    async def newest_checkpoint(self, session_id: SessionId) -> Checkpoint:
        """The one whose files are the newest.

        Raises:
            Conflict: `session_without_checkpoint`.
        """
        found = await self.database.read(lambda tx: checkpoints.list_intact(tx, session_id))
        if not found:
            raise Conflict("session_without_checkpoint", f"cannot read session {session_id}: it has no checkpoint")
        return max(found, key=cut_order)

    async def pull(self, session_id: SessionId, destination: Path) -> ExportReport:
        """Lay the session's newest checkpointed workspace over a directory."""
        destination.mkdir(parents=True, exist_ok=True)
        store = await self.stores.of(await self.session(session_id))
        async with store.lease():
            point = await self.newest_checkpoint(session_id)
            return await asyncio.to_thread(store.export_workspace, point, destination)

    async def diff(self, session_id: SessionId) -> list[Change]:
        """What the session changed in its workspace, from the seed to its newest checkpoint."""
        store = await self.stores.of(await self.session(session_id))
        async with store.lease():
            last = await self.newest_checkpoint(session_id)
            found = await self.database.read(lambda tx: checkpoints.list_intact(tx, session_id))
            first = min(found, key=cut_order)
            return await asyncio.to_thread(store.diff, first, last)

    async def remove(self, session_id: SessionId, me: leasing.Holder, answers: leasing.HolderAnswers) -> None:
        """Forget a session: rows and key, blobs, directories, sandboxes. Its snapshots become garbage for `collect`."""
        lock = await leasing.acquire_lock(session_id, self.home.lock(session_id), me, answers=answers)
        try:
            session = await self.session(session_id)
            token = await self.database.write(lambda tx: self._acquire(tx, session, me), durable=True)
            await self._free(session)
            await asyncio.to_thread(drop_shared, self.home.shared_indexes, session_id)
            await self.database.write(
                lambda tx: sessions.forget(tx, session_id=session_id, owner_token=token), durable=True
            )
            crash_point("session.forgotten")
            await ahead.sweep(self.database, session_id)
            await asyncio.to_thread(shutil.rmtree, self.home.session(session_id), ignore_errors=True)
            self.home.drop_search_index()
            with contextlib.suppress(Conflict):  # Who reads an older state keeps the WAL, until he closes the database.
                await self.database.settle()
        finally:
            lock.release()

    async def redact(
        self,
        session_id: SessionId,
        find: redacting.Find,
        me: leasing.Holder,
        answers: leasing.HolderAnswers,
    ) -> redaction.Plan:
        """Mask what `find` finds in a session that no node runs, for good. The lock keeps every node out meanwhile."""
        lock = await leasing.acquire_lock(session_id, self.home.lock(session_id), me, answers=answers)
        try:
            session = await self.session(session_id)
            token = await self.database.write(lambda tx: self._acquire(tx, session, me), durable=True)
            owned = Ahead(database=self.database, session_id=session_id, owner_token=token)
            return await redacting.redact(owned, find, home=self.home, clock=self.clock)
        finally:
            lock.release()

    async def finish_redaction(self, session_id: SessionId, me: leasing.Holder, answers: leasing.HolderAnswers) -> None:
        """Delete what a kill left of an earlier redaction's old bytes, if it left any."""
        if await ahead.find_left_over(self.database, session_id):
            await self.redact(session_id, lambda _: redaction.Plan(), me, answers)

    async def import_session(
        self, lines: Iterable[str], me: leasing.Holder, answers: leasing.HolderAnswers
    ) -> SessionId:
        """Bring an exported session back, to be read.

        Raises:
            As `transfer.bring_in`.
        """
        incoming = await asyncio.to_thread(transfer.Incoming, lines)
        session_id = incoming.session_id
        await self.database.read(lambda tx: transfer.check_new(tx, session_id))
        lock = await leasing.acquire_lock(session_id, self.home.lock(session_id), me, answers=answers)
        try:
            await transfer.bring_in(incoming, self.database, self.home)
        finally:
            lock.release()
        return session_id

    async def _tidy(self, session: sessions.Session, me: leasing.Holder, answers: leasing.HolderAnswers) -> None:
        """Free what an ended session's last node left behind when it was killed right after the end."""
        lock = await leasing.acquire_lock(session.session_id, self.home.lock(session.session_id), me, answers=answers)
        try:
            await self._free(session)
        finally:
            lock.release()

    async def _free(self, session: sessions.Session) -> None:
        """Destroy every sandbox of a session whose lock is held, and what it has staged in memory."""
        from torpor.runtime.incarnation import sweep

        driver = self.drivers(await self.runsc()).present
        spec = msgspec.convert(session.spec, SessionSpec)
        await sweep(self.home, session.session_id, spec, driver, keep=None)
        Staging(self.home.root, session.session_id).clear()

    @contextlib.asynccontextmanager
    async def borrow(
        self, session_id: SessionId, me: leasing.Holder, answers: leasing.HolderAnswers
    ) -> AsyncGenerator[Records]:
        """Own a session that no node runs for as long as the context lasts: to resolve, to send, to raise a budget.

        What waits for it goes on when a node runs the session.
        """
        lock = await leasing.acquire_lock(session_id, self.home.lock(session_id), me, answers=answers)
        try:
            session = await self.session(session_id)
            token = await self.database.write(lambda tx: self._acquire(tx, session, me), durable=True)
            records = Records(database=self.database, session_id=session_id, owner_token=token, clock=self.clock)
            yield records
            await records.release()
        finally:
            lock.release()

    @contextlib.asynccontextmanager
    async def freed(
        self, session_id: SessionId, me: leasing.Holder, answers: leasing.HolderAnswers
    ) -> AsyncGenerator[Records]:
        """As `borrow`, with nothing left of the session's sandboxes."""
        session = await self.session(session_id)
        async with self.borrow(session_id, me, answers) as records:
            await self._free(session)
            yield records

    def holding(self, me: leasing.Holder, ask: Ask) -> Holding:
        """Sessions for a moment, for what waits for no node."""
        return Holding(home=self.home, database=self.database, me=me, ask=ask, clock=self.clock)

    async def collect(
        self, options: "CollectOptions", me: leasing.Holder, ask: Ask, progress: "Progress"
    ) -> "CollectReport":
        """Forget what retention does not keep, and free what no checkpoint needs."""
        from torpor.runtime.collecting import Collecting

        return await Collecting(
            home=self.home,
            database=self.database,
            stores=self.stores,
            blob_store=self.blobs,
            policy=self.retention,
            holding=self.holding(me, ask),
            options=options,
            progress=progress,
            clock=self.clock,
        ).run()

    async def cancel(self, session_id: SessionId, me: leasing.Holder, answers: leasing.HolderAnswers) -> None:
        """End a session that no node runs; its sandbox, if one is left, is destroyed."""
        lock = await leasing.acquire_lock(session_id, self.home.lock(session_id), me, answers=answers)
        try:
            session = await self.session(session_id)
            if session.status in ENDED:
                return
            token = await self.database.write(lambda tx: self._acquire(tx, session, me), durable=True)
            await self._free(session)
            records = Records(database=self.database, session_id=session_id, owner_token=token, clock=self.clock)
            await records.set_status(SessionStatus.CANCELLED, "killed by a person")
            await records.release()
        finally:
            lock.release()

    async def runsc(self) -> Runsc:
        """The runsc that new sandboxes are made with.

        Raises:
            MachineUnfit: as `find_runsc`.
        """
        return await asyncio.to_thread(find_runsc, self.home.tools, os.environ, self.clock)

    def drivers(self, runsc: Runsc) -> GvisorDrivers:
        """The drivers that can be had with this runsc."""
        tools, state = self.home.tools, self.home.driver_state
        return GvisorDrivers(runsc=runsc, tools_directory=tools, state_directory=state, clock=self.clock)

    def _acquire(self, tx: Transaction, seen: sessions.Session, me: leasing.Holder) -> int:
        return leasing.acquire(tx, seen, me, wall_ns=self.clock.wall_ns())

    def _environments(self, request: Request, caller: Mapping[str, str]) -> list[Path]:
        return rootfs.python_environments(request.argv[0], caller, self.clock)


@contextlib.asynccontextmanager
async def open_runtime(environment: Mapping[str, str], clock: Clock) -> AsyncGenerator[Runtime]:
    """Open TORPOR_HOME, making it if need be."""
    home = Home(torpor_home(environment))
    upstreams, prices = read_upstreams(home.root, environment), read_prices(home.root)
    settings, retention = read_store(home.root, environment), read_retention(home.root)
    home.prepare()
    backend, blobs = open_configured(settings, clock, cached_packs=home.cached_packs), open_blobs(home.store)
    database = await open_database(home.database_url, clock=clock, blobs=blobs)
    try:
        yield Runtime(
            home=home,
            upstreams=upstreams,
            prices=prices,
            retention=retention,
            tiers=read_tiers(home.root),
            starts_max=read_starts_max(home.root),
            database=database,
            backend=backend,
            blobs=blobs,
            stores=SessionStores(home, backend, database, MasterKeys(home.keys, environment), clock),
            clock=clock,
        )
    finally:
        backend.close()
        await database.close()


def node_holder(home: Home, node_id: NodeId) -> leasing.Holder:
    """What this process writes into the lock files that it holds."""
    return leasing.Holder(node_id=node_id, pid=os.getpid(), socket=home.socket(node_id))
