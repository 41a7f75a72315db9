"""`torpor collect`: forgets what retention does not keep, repacks what is mostly dead, sweeps what nobody needs.

Joins the store's collector, which knows no session, to the rows that are its roots, in the order of docs/collecting.md.
Of a session that a node runs nothing is written here: the node forgets by itself, and is asked to move its rows.
"""

import asyncio
import contextlib
import shutil
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass, field

from torpor.core.clock import Clock
from torpor.core.crash import crash_point
from torpor.core.errors import Superseded
from torpor.core.ids import SessionId
from torpor.core.retention import RetentionPolicy
from torpor.db import ahead, blobs, keys, roots
from torpor.db.database import Database
from torpor.db.roots import Root
from torpor.runtime.holding import Holding
from torpor.runtime.home import Home
from torpor.runtime.repacking import Repacking
from torpor.runtime.session_store import SessionStores
from torpor.snapshots import collect
from torpor.snapshots.backend import Backend
from torpor.snapshots.collect import Collector, Progress, Swept
from torpor.snapshots.garbage import SweepPlan
from torpor.snapshots.lease import Lease
from torpor.snapshots.manifest import manifest_key


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectOptions:
    """What a person asks for.

    Attributes:
        grace_seconds: how old garbage has to be.
        dry_run: say what would go, and change nothing.
        repack: also write packs anew that are mostly dead.
        forget_damaged: give up on checkpoints whose manifests can't be read.
    """

    grace_seconds: float
    dry_run: bool = False
    repack: bool = True
    forget_damaged: bool = False


@dataclass(slots=True, kw_only=True)
class CollectReport:
    """What was done, or would be.

    Attributes:
        forgotten, damaged: checkpoints that retention does not keep; that were given up.
        repacked, images: packs that were written anew; images that were scattered, and lie side by side now.
        moved: checkpoints that name their snapshots by a new name for that.
        left: sessions that a node runs, which forgets by itself.
        freed_bytes, written_bytes: of the store; the second by repacking.
        young_bytes: of garbage that is too young to go.
        note: why nothing was repacked, if something kept it.
    """

    forgotten: int = 0
    damaged: int = 0
    repacked: int = 0
    images: int = 0
    moved: int = 0
    manifests: int = 0
    packs: int = 0
    blobs: int = 0
    freed_bytes: int = 0
    written_bytes: int = 0
    young_bytes: int = 0
    left: set[SessionId] = field(default_factory=set[SessionId])
    note: str = ""

    def add(self, swept: Swept) -> None:
        self.manifests += swept.manifests
        self.packs += swept.packs
        self.freed_bytes += swept.stored_bytes


class Collecting:
    """One collection of one TORPOR_HOME's store."""

    def __init__(
        self,
        *,
        home: Home,
        database: Database,
        stores: SessionStores,
        blob_store: Backend,
        policy: RetentionPolicy,
        holding: Holding,
        options: CollectOptions,
        progress: Progress,
        clock: Clock,
    ) -> None:
        self._home = home
        self._database = database
        self._stores = stores
        self._blob_store = blob_store
        self._policy = policy
        self._holding = holding
        self._options = options
        self._progress = progress
        self._clock = clock
        self._report = CollectReport()

    async def run(self) -> CollectReport:
        """Collect.

        Raises:
            Conflict: `collect_running`, `collect_waited`, `store_shared`, `lease_lost`.
            Damaged: `collect_refused`.
        """
        leases = self._stores.backend.leases
        if self._options.dry_run:
            async with _held(await asyncio.to_thread(leases.hold)) as lease:
                await self._plan_only(lease)
            return self._report
        async with _held(await asyncio.to_thread(leases.hold_alone)) as alone:
            collector = await self._collector(alone, DatabaseRoots(self._database))
            if self._options.forget_damaged:
                await self._forget_damaged(collector)
            self._report.add(await asyncio.to_thread(collector.sweep))
            await self._forget_old()
            if self._options.repack:
                await self._repack()
            plan = await asyncio.to_thread(collector.plan)
            self._report.young_bytes = plan.young_bytes
            await asyncio.to_thread(collector.condemn, plan)
            self._report.add(await asyncio.to_thread(collector.sweep))
        await self._sweep_blobs()
        return self._report

    async def _plan_only(self, lease: Lease) -> None:
        """What would go. Repacking is left out: what it would free is only known when it is done."""
        going = await self._forget_old()
        collector = await self._collector(lease, DatabaseRoots(self._database, without=going))
        plan: SweepPlan = await asyncio.to_thread(collector.plan)
        planned = Swept(manifests=len(plan.manifests), packs=len(plan.packs), stored_bytes=plan.stored_bytes)
        self._report.add(planned)
        self._report.young_bytes = plan.young_bytes
        await self._sweep_blobs()

    async def _collector(self, lease: Lease, names: "DatabaseRoots") -> Collector:
        tenant = await self._database.read(keys.tenant)
        return Collector(
            self._stores.backend,
            names,
            lease,
            tenant_id=None if tenant is None else tenant.key_id,
            grace_seconds=self._options.grace_seconds,
            progress=self._progress,
        )

    async def _forget_old(self) -> list[Root]:
        """Apply the retention policy to the sessions that nobody runs, and give what it forgets."""
        found = await self._database.read(roots.list_roots)
        counts = Counter(root.session_id for root in found)
        many = [session_id for session_id, count in counts.items() if count > self._policy.keep_last]
        going: list[Root] = []
        for done, session_id in enumerate(many, 1):
            forgotten = await self._forget_old_of(session_id)
            going += [root for root in found if root.session_id == session_id and root.number in forgotten]
            self._progress("forgetting checkpoints", done, len(many))
        self._report.forgotten += len(going)
        return going

    async def _forget_old_of(self, session_id: SessionId) -> Collection[int]:
        plan = await self._database.read(lambda tx: roots.plan(tx, session_id, self._policy))
        if not plan.forgotten:
            return ()
        if self._options.dry_run:
            if self._holding.is_run(session_id):
                self._report.left.add(session_id)
                return ()
            return plan.forgotten
        with contextlib.suppress(Superseded):
            async with self._holding.owned(session_id) as records:
                if records is None:
                    self._report.left.add(session_id)
                    return ()
                forgotten = await records.retain(self._policy, in_use=(), at_least=1)
                crash_point("retention.forgotten")
                return forgotten
        return ()

    async def _forget_damaged(self, collector: Collector) -> None:
        found = {manifest_key(root.snapshot_id): root for root in await self._database.read(roots.list_roots)}
        told = await asyncio.to_thread(DatabaseRoots(self._database).manifests)
        unreadable = await asyncio.to_thread(collector.unreadable, told)
        by_session: dict[SessionId, list[Root]] = defaultdict(list)
        for key in unreadable:
            by_session[found[key].session_id].append(found[key])
        for session_id, damaged in by_session.items():
            async with self._holding.owned(session_id) as records:
                if records is None:
                    self._report.left.add(session_id)
                else:
                    await records.forget_damaged(damaged)
                    self._report.damaged += len(damaged)

    async def _repack(self) -> None:
        repacking = Repacking(
            home=self._home,
            database=self._database,
            stores=self._stores,
            holding=self._holding,
            grace_seconds=self._options.grace_seconds,
            progress=self._progress,
            clock=self._clock,
        )
        done = await repacking.run()
        self._report.repacked, self._report.images, self._report.moved = done.packs, done.images, done.checkpoints
        self._report.written_bytes, self._report.note = done.stored_bytes, done.note

    async def _sweep_blobs(self) -> None:
        """Delete bodies of the event log that no row names: under their session's lock, nobody puts one meanwhile."""
        entries = await asyncio.to_thread(self._blob_store.entries, "blobs/")
        named = await self._database.read(blobs.list_named)
        garbage = {entry.key: entry.stored_bytes for entry in entries if entry.key not in named}
        by_session: dict[SessionId, list[str]] = defaultdict(list)
        for key in garbage:
            by_session[SessionId("ses_" + key.removeprefix("blobs/").partition("_")[0])].append(key)
        for done, (session_id, found) in enumerate(by_session.items(), 1):
            if await self._sweep_blobs_of(session_id):
                self._report.blobs += len(found)
                self._report.freed_bytes += sum(garbage[key] for key in found)
            else:
                self._report.left.add(session_id)
            self._progress("deleting blobs", done, len(by_session))

    async def _sweep_blobs_of(self, session_id: SessionId) -> bool:
        """False if a node runs the session: it sweeps when it is resumed."""
        if self._options.dry_run:
            return not self._holding.is_run(session_id)
        with self._holding.locked(session_id) as is_mine:
            if not is_mine:
                return False
            await self._database.write(lambda _: None, durable=True)
            await ahead.sweep(self._database, session_id)
            if await self._database.read(lambda tx: tx.one("session/find_by_id", session_id=session_id)) is None:
                await asyncio.to_thread(shutil.rmtree, self._home.session(session_id), ignore_errors=True)
            return True


class DatabaseRoots:
    """What the collector asks of the database, from its own thread."""

    def __init__(self, database: Database, *, without: Sequence[Root] = ()) -> None:
        """Args:
        without: what is to be taken for forgotten.
        """
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._without = {root.checkpoint_id for root in without}

    def manifests(self) -> dict[str, collect.Root]:
        found = asyncio.run_coroutine_threadsafe(self._database.read(roots.list_roots), self._loop).result()
        return {
            manifest_key(root.snapshot_id): collect.Root(root.manifest_digest, str(root))
            for root in found
            if root.checkpoint_id not in self._without
        }

    def sync(self) -> None:
        writing = self._database.write(lambda _: None, durable=True)
        asyncio.run_coroutine_threadsafe(writing, self._loop).result()


@contextlib.asynccontextmanager
async def _held(lease: Lease) -> AsyncGenerator[Lease]:
    try:
        yield lease
    finally:
        await asyncio.to_thread(lease.release)
