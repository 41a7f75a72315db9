"""Makes checkpoints: cuts while the agent waits anyway, commits while it runs on, and skips what the session can't pay.

A cut (cutting.py) leaves image and changed files in memory. What follows, and what a kill -9 between any two steps
leaves:

    the cut is queued for its commit; one that waited there is overtaken, and an event says so
        `checkpoint.overtaken` the log says that it was dropped; what is staged of both is garbage
    packs and manifest into the store, fsynced
        `checkpoint.stored`    objects that no checkpoint names: garbage for `collect`
    one transaction: checkpoint row, event and head
        `checkpoint.committed` the checkpoint is there; the image stays cached in memory
    now and then one transaction: rows that retention does not keep, event and head
        `retention.forgotten`  snapshots that no row names: garbage for `collect`

From before the parent's index is read until the commit a store lease keeps collectors away (docs/collecting.md).

Instead of a cut, a turn may get an event alone:

        `checkpoint.skipped`   nothing was cut: the log covers the turn from the checkpoint before it

The next cut does not wait for a commit, but for memory if its image does not fit beside those that are staged.
"""

import asyncio
import logging
import shutil
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from pathlib import Path

from torpor.core.call import Call
from torpor.core.checkpoint import Checkpoint, holds_barrier
from torpor.core.clock import Clock
from torpor.core.crash import crash_point
from torpor.core.errors import Damaged, SandboxFailed, Superseded, TorporError
from torpor.core.ids import CallId, SnapshotId, new_snapshot_id
from torpor.core.pacing import Pace
from torpor.core.pins import Pins
from torpor.core.retention import RetentionPolicy
from torpor.db.roots import Move
from torpor.gateway.pumps import FirstByteAt
from torpor.gateway.server import Gateway
from torpor.runtime.commit_queue import CommitQueue
from torpor.runtime.cutting import Base, Cut, Cutter, files_checkpoint
from torpor.runtime.incarnation import Incarnation
from torpor.runtime.preparing import prepare
from torpor.runtime.records import Records
from torpor.runtime.session_store import SessionStore
from torpor.runtime.staging import Staging
from torpor.snapshots.capture import TreeCapture, capture
from torpor.snapshots.lease import Lease
from torpor.snapshots.manifest import SnapshotRef
from torpor.snapshots.store import SavedSnapshot

logger = logging.getLogger(__name__)

_COLLECTION_PAUSES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 20)
"""Seconds between the attempts at a commit that refers to what a collection has on its list."""
FORGOTTEN_AT_ONCE = 10
"""Checkpoints are forgotten when there are so many to go: one event, and one look at the rows that stay, for all."""


class Checkpointer:
    """Takes and commits the checkpoints of one session: cuts one at a time, commits one at a time and in order."""

    def __init__(
        self,
        *,
        records: Records,
        store: SessionStore,
        staging: Staging,
        gateway: Gateway,
        clock: Clock,
        share_ppm: int,
        retention: RetentionPolicy,
    ) -> None:
        self._records = records
        self._store = store
        self._staging = staging
        self._clock = clock
        self._retention = retention
        self._cutter = Cutter(records=records, staging=staging, gateway=gateway, clock=clock)
        self._pace = Pace(share_ppm, clock.monotonic())
        self._base = Base()
        self._queue = CommitQueue[Cut]()
        self._cutting = asyncio.Lock()
        self._cuts_begun = 0
        self._life: Incarnation | None = None
        self._next_number = 0
        self._expected_bytes = 0
        self._kept: SnapshotId | None = None
        # What the next snapshot is stored against comes last. A cut that waits, or is being made, was compared with one
        # of these: while it was captured no more than two commits can have ended.
        self._recent: deque[SnapshotRef] = deque(maxlen=3)
        self._has_image = False
        self._committed: tuple[int, Checkpoint] | None = None
        self._first_commit = asyncio.Event()
        self.last_cut_at = clock.monotonic()

    async def begin_life(
        self, life: Incarnation, checkpoint: Checkpoint, *, next_number: int, stands_alone: bool = False
    ) -> None:
        """From now on checkpoints are of this incarnation, which came from (or is after) that checkpoint.

        Nothing of an earlier life may be on its way to a commit.

        Args:
            stands_alone: no memory restored, so nothing that is stored is trusted: the next checkpoint shares nothing.
        """
        # What is staged besides is of a node that died.
        await asyncio.to_thread(self._staging.keep_only, {checkpoint.snapshot_id})
        await asyncio.to_thread(_remove, life.clones)
        self._life = life
        self._next_number = next_number
        self._kept = checkpoint.snapshot_id
        self._has_image = checkpoint.has_memory
        self._expected_bytes = checkpoint.raw_bytes
        if stands_alone:
            self._recent.clear()
            self._base = Base()
        else:
            self._recent.append(self._store.ref(checkpoint))
            self._base = Base(tree=life.tree, ref=self._recent[-1])
        self._pace.begin_life()
        self.last_cut_at = self._clock.monotonic()

    async def first_commit(self) -> None:
        """Wait for the first checkpoint of this owner."""
        await self._first_commit.wait()

    def end_life(self) -> None:
        self._life = None

    async def prepare(self) -> None:
        """Let the agent's hooks run, for whom a checkpoint is made that can wait for them."""
        if self._life is not None:
            await prepare(self._life.link, self._clock.wall_ns())

    async def take_turn(self, call_id: CallId, first_byte_at: FirstByteAt) -> None:
        """Checkpoint the turn that begins with this call, unless the session still owes for the last ones.

        Nothing of the answer is delivered before this returns: what it is held back for is what the turn costs.

        Raises:
            Superseded: another node owns the session now.
        """
        begun_before = self._cuts_begun
        if self._pace.due(self._clock.monotonic()):
            async with self._cutting:
                if self._cuts_begun == begun_before:
                    await self._turn(call_id)
        else:
            await self._skip(call_id, "share")
        ready_at = first_byte_at()
        if ready_at is not None:
            self._pace.charge(ready_at, self._clock.monotonic())

    async def take(self, reason: str) -> int | None:
        """Make a checkpoint of now; returns when the agent runs on, the commit goes on behind.

        Whoever asks while a cut is on its way is served by the next one, together with all who asked by then. A failure
        is an event in the log, never the caller's: the session runs on and the older checkpoint stands.

        Returns:
            The cut's number in the commit queue; None when there is none.

        Raises:
            Superseded: another node owns the session now.
        """
        begun_before, cut_before = self._cuts_begun, self._queue.newest
        async with self._cutting:
            if self._cuts_begun == begun_before and self._life is not None:
                await self._wait_for_room()
                async with AsyncExitStack() as still:
                    await self._take(self._life, reason, still, last=False)
            return self._queue.newest if self._queue.newest > cut_before else None

    async def take_and_commit(self, reason: str) -> Checkpoint | None:
        """Make a checkpoint and wait until it, or a newer one, is durable; None when that failed: the log explains."""
        cut = await self.take(reason)
        return None if cut is None else await self._outcome(cut)

    async def take_for(self, call: Call) -> Checkpoint | None:
        """A durable checkpoint that the agent asks for with this call, made now or before its node died.

        Raises:
            SandboxFailed: ("sandbox_gone") the sandbox that asks died meanwhile; the next one asks again.
        """
        for found in reversed(await self._records.checkpoints()):
            if holds_barrier(found, call.call_id):
                return found
        life = self._life
        await self.prepare()
        made = await self.take_and_commit("agent")
        if made is not None and made.seq >= call.intended_seq:
            return made
        if life is None or self._life is not life:
            raise SandboxFailed("sandbox_gone", f"cannot make a checkpoint for {call.call_id}: its sandbox is gone")
        return None

    async def take_last(self, reason: str, still: AsyncExitStack) -> Checkpoint | None:
        """Make the checkpoint that this life may end with, and wait until it is durable.

        From its cut on the sandbox stays paused and its link silent. The caller destroys it, or closes `still`: then it
        runs on as if it had not been the last. None when it failed, which the log explains: then it runs on as well.
        """
        async with self._cutting:
            life, before = self._life, self._queue.newest
            if life is None:
                return None
            await self._wait_for_room()
            await self._take(life, reason, still, last=True)
            made = await self._outcome(self._queue.newest) if self._queue.newest > before else None
            if made is None:
                await still.aclose()
            else:
                self._life = None
                still.callback(self._go_on_with, life)
            return made

    def _go_on_with(self, life: Incarnation) -> None:
        self._life = life

    async def commit_forever(self) -> None:
        """Commit what was cut, in order; runs beside the session."""
        while True:
            number, cut = await self._queue.next()
            try:
                await self._commit(number, cut)
                await self._forget_old()
            except Superseded:
                raise
            except (TorporError, OSError) as error:
                # What the capture was compared with may be what is damaged: read the whole workspace next time.
                self._base = Base()
                await self._discard(cut.checkpoint.snapshot_id, cut.clones)
                logger.warning("checkpoint not committed: %s", error)
                await self._records.checkpoint_failed(cut.checkpoint.incarnation, cut.checkpoint.reason, error)
            finally:
                self._queue.done(number)

    def lease(self) -> AbstractAsyncContextManager[Lease]:
        """For `final_files`: hold it until that is committed."""
        return self._store.lease()

    async def final_files(self, life: Incarnation, lease: Lease) -> Checkpoint:
        """The workspace as the agent left it, stored and not yet committed; nothing runs in the sandbox any more."""
        wall_ns = self._clock.wall_ns()
        snapshot_id = new_snapshot_id(wall_ns)
        await asyncio.to_thread(self._staging.begin, snapshot_id, 0)
        seq, cursor_seq = await self._records.position()
        changes, base = self._staging.changes(snapshot_id), self._base
        workspace = await asyncio.to_thread(capture, life.plan.workspace, changes, base.tree)
        saved = await self._save(snapshot_id, workspace, base.ref, life.pins, lease)
        await asyncio.to_thread(self._staging.discard, snapshot_id)
        return files_checkpoint(
            saved,
            session_id=self._records.session_id,
            number=self._next_number,
            seq=seq,
            cursor_seq=cursor_seq,
            incarnation=life.number,
            reason="exit",
            wall_ns=wall_ns,
        )

    async def settle(self) -> None:
        """Wait until everything that was cut, or is being cut, is committed or has failed."""
        async with self._cutting:
            await self._queue.known(self._queue.newest)

    async def _turn(self, call_id: CallId) -> None:
        """Cut for a turn that was due; meanwhile another one may have been charged, or have taken the memory."""
        life = self._life
        if life is None:
            return
        if not self._pace.due(self._clock.monotonic()):
            await self._skip(call_id, "share")
        elif not self._queue.idle and not await self._has_room():
            await self._skip(call_id, "memory")
        else:
            self._pace.begun()
            async with AsyncExitStack() as still:
                await self._take(life, "call", still, last=False)

    async def _skip(self, call_id: CallId, reason: str) -> None:
        if self._life is not None:
            owed_ms = round(self._pace.owed_seconds(self._clock.monotonic()) * 1e3)
            await self._records.checkpoint_skipped(self._life.number, call_id, {"reason": reason, "owed_ms": owed_ms})
            crash_point("checkpoint.skipped")

    async def _wait_for_room(self) -> None:
        """A checkpoint that was asked for waits until those before it have left the memory that it needs."""
        while not self._queue.idle and not await self._has_room():
            await self._queue.progress()

    async def _has_room(self) -> bool:
        """Whether an image fits; for it, those of sleeping sessions go."""
        return await asyncio.to_thread(self._staging.make_room, self._expected_bytes)

    async def _stage(self, snapshot_id: SnapshotId) -> None:
        """Make room for an image; the one that is kept for a restore goes too if it has to."""
        if not await self._has_room():
            await self._keep(None)
        await asyncio.to_thread(self._staging.begin, snapshot_id, self._expected_bytes)

    async def _take(self, life: Incarnation, reason: str, still: AsyncExitStack, *, last: bool) -> None:
        """Cut, and hand over to the commit."""
        self._cuts_begun += 1
        snapshot_id = new_snapshot_id(self._clock.wall_ns())
        cut, began = None, self._clock.monotonic()
        try:
            await self._stage(snapshot_id)
            cut = await self._cutter.cut(
                life, snapshot_id, self._base, still, number=self._next_number, reason=reason, last=last
            )
        except Superseded:
            raise
        except (TorporError, OSError) as error:
            await still.aclose()
            await self._discard(snapshot_id, life.clones / snapshot_id)
            logger.warning("no checkpoint: %s", error)
            await self._records.checkpoint_failed(life.number, reason, error)
        if reason != "call" or (cut is not None and cut.broke_into_an_answer):
            self._pace.charge(began, self._clock.monotonic() if cut is None else cut.ended_at)
        if cut is not None:
            await self._queue_up(cut)

    async def _queue_up(self, cut: Cut) -> None:
        self._next_number += 1
        self._expected_bytes = cut.checkpoint.raw_bytes
        self.last_cut_at = cut.ended_at
        overtaken = self._queue.put(cut)
        if overtaken is not None:
            point = overtaken.checkpoint
            data = {"number": point.number, "reason": point.reason, "by": cut.checkpoint.number}
            await self._records.checkpoint_overtaken(point.incarnation, data)
            crash_point("checkpoint.overtaken")
            await self._discard(point.snapshot_id, overtaken.clones)
        # What is staged now is what a restore would want, once it is committed.
        await self._keep(None)

    async def _outcome(self, cut: int) -> Checkpoint | None:
        """The checkpoint that a cut became, or that a newer one became which overtook it."""
        await self._queue.known(cut)
        committed, checkpoint = self._committed or (0, None)
        return checkpoint if committed >= cut else None

    async def _commit(self, number: int, cut: Cut) -> None:
        snapshot_id = cut.checkpoint.snapshot_id
        for pause in (*_COLLECTION_PAUSES, None):
            try:
                async with self._store.lease() as lease:
                    await self._store_and_commit(number, cut, lease)
                break
            except Damaged as error:
                if error.code != "snapshot_condemned" or pause is None:
                    raise
            # Without our lease the collection goes on, reads the row that keeps the pack, and strikes it off its list.
            await asyncio.sleep(pause)
        await asyncio.to_thread(_remove, cut.clones)
        if self._queue.newest == number:
            await asyncio.to_thread(self._staging.discard_changes, snapshot_id)
            await self._keep(snapshot_id)
        else:
            await asyncio.to_thread(self._staging.discard, snapshot_id)
        self._first_commit.set()

    async def _store_and_commit(self, number: int, cut: Cut, lease: Lease) -> None:
        saved = await self._save(cut.checkpoint.snapshot_id, cut.workspace, cut.base.ref, cut.pins, lease)
        crash_point("checkpoint.stored")
        checkpoint = replace(
            cut.checkpoint,
            manifest_digest=saved.manifest_digest,
            stored_bytes=saved.stored_bytes,
            commit_ns=round((self._clock.monotonic() - cut.ended_at) * 1e9),
        )
        await asyncio.to_thread(lease.check)
        self._committed = number, await self._records.commit_checkpoint(checkpoint)
        crash_point("checkpoint.committed")
        self._base = Base(tree=saved.tree, ref=saved.ref)
        self._recent.append(saved.ref)
        is_first, self._has_image = not self._has_image, True
        if is_first:
            await self._share(saved.ref)

    async def _save(
        self,
        snapshot_id: SnapshotId,
        workspace: TreeCapture,
        compared_with: SnapshotRef | None,
        pins: Pins,
        lease: Lease,
    ) -> SavedSnapshot:
        return await asyncio.to_thread(
            self._store.save,
            image_dir=self._staging.image(snapshot_id),
            workspace=workspace,
            parent=self._recent[-1] if self._recent else None,
            stands_alone=not self._recent,
            compared_with=compared_with,
            pins=pins,
            snapshot_id=snapshot_id,
            lease=lease,
        )

    def in_use(self) -> set[SnapshotId]:
        """What the next snapshots are stored against or were compared with."""
        return {ref.id for ref in self._recent}

    async def move(self, moves: Sequence[Move]) -> int:
        """Let checkpoints name their repacked snapshots, but for those in use; gives how many do."""
        in_use = self.in_use()
        return len(await self._records.move([move for move in moves if move.seen_id not in in_use]))

    async def _forget_old(self) -> None:
        """Apply the retention policy."""
        try:
            forgotten = await self._records.retain(self._retention, in_use=self.in_use(), at_least=FORGOTTEN_AT_ONCE)
        except Superseded:
            raise
        except TorporError as error:
            logger.warning("no checkpoint was forgotten: %s", error)
        else:
            if forgotten:
                crash_point("retention.forgotten")

    async def _share(self, ref: SnapshotRef) -> None:
        """Others may refer to it from now on. Whether they can is no matter of this session's."""
        try:
            await asyncio.to_thread(self._store.share, ref)
        except (TorporError, OSError) as error:
            logger.warning("nothing shared: %s", error)

    async def _discard(self, snapshot_id: SnapshotId, clones: Path) -> None:
        await asyncio.to_thread(self._staging.discard, snapshot_id)
        await asyncio.to_thread(_remove, clones)

    async def _keep(self, snapshot_id: SnapshotId | None) -> None:
        """The image that stays in memory for a restore; the one before is freed."""
        freed, self._kept = self._kept, snapshot_id
        if freed is not None and freed != snapshot_id:
            await asyncio.to_thread(self._staging.discard, freed)


def _remove(clones: Path) -> None:
    """Clones are of one cut. A kill -9 leaves them; the next life of their sandbox removes them."""
    shutil.rmtree(clones, ignore_errors=True)
