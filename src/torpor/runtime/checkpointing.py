"""Makes checkpoints: the cut while the agent waits anyway, then the commit while it runs on.

Order, and what a kill -9 between any two steps leaves (RECOVERY section 3; the names are crash points):

    hold delivery, BARRIER, note the log's head
        `checkpoint.cut`       the sandbox waits at the barrier; the next node's HELLO ends it
    mark the sandbox as paused, pause
        `checkpoint.paused`    the next node finds the mark and resumes the sandbox before it adopts it
    image to memory, workspace changes to staging
        `checkpoint.imaged`    as above; the staging directory is garbage
    resume, remove the mark, RELEASE
        `checkpoint.resumed`   the staging directory and the life's clones are garbage, nothing else happened
    packs and manifest into the store, fsynced
        `checkpoint.stored`    objects that no checkpoint names: garbage for `collect`
    one transaction: checkpoint row, event and head
        `checkpoint.committed` the checkpoint is there; the image stays cached in memory
    now and then one transaction: rows that retention does not keep, event and head
        `retention.forgotten`  snapshots that no row names: garbage for `collect`

From before the parent's index is read until the commit a store lease keeps collectors away (docs/collecting.md).

The checkpoint that a life ends with leaves out the resume (RECOVERY section 8): what the agent did after its cut would
be lost with the sandbox, so it does nothing. A kill -9 leaves the sandbox paused with its mark, as after a pause.
"""

import asyncio
import logging
import shutil
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torpor.core.call import Call
from torpor.core.checkpoint import Checkpoint, OpenStream, holds_barrier
from torpor.core.clock import Clock
from torpor.core.crash import crash_point
from torpor.core.errors import SandboxFailed, Superseded, TorporError
from torpor.core.ids import SessionId, SnapshotId, StreamId, new_checkpoint_id, new_snapshot_id
from torpor.core.pins import Pins
from torpor.core.retention import RetentionPolicy
from torpor.gateway.server import Gateway, OpenCall
from torpor.runtime.incarnation import Incarnation
from torpor.runtime.records import Records
from torpor.runtime.session_store import SessionStore
from torpor.runtime.staging import Staging
from torpor.sandbox.frames import GuestStatus
from torpor.snapshots.capture import TreeCapture, capture
from torpor.snapshots.lease import Lease
from torpor.snapshots.manifest import SnapshotRef
from torpor.snapshots.store import SavedSnapshot
from torpor.snapshots.tree import TreeIndex

logger = logging.getLogger(__name__)

CUT_DEADLINE_SECONDS = 20
STDOUT, STDERR = 1, 2
FORGOTTEN_AT_ONCE = 10
"""Checkpoints are forgotten when there are so many to go: one event, and one look at the rows that stay, for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A checkpoint that is taken but not committed: its image and changed files are staged in memory."""

    checkpoint: Checkpoint
    workspace: TreeCapture
    pins: Pins
    clones: Path


class Checkpointer:
    """Takes and commits the checkpoints of one session, one at a time and in order."""

    def __init__(
        self,
        *,
        records: Records,
        store: SessionStore,
        staging: Staging,
        gateway: Gateway,
        clock: Clock,
        retention: RetentionPolicy,
    ) -> None:
        self._records = records
        self._store = store
        self._staging = staging
        self._gateway = gateway
        self._clock = clock
        self._retention = retention
        self._first_commit = asyncio.Event()
        self._life: Incarnation | None = None
        self._cutting = asyncio.Lock()
        self._cuts_begun = 0
        self._waiting: asyncio.Queue[Cut] = asyncio.Queue()
        self._newest: Checkpoint | None = None
        self._committed: Checkpoint | None = None
        self._tree: TreeIndex | None = None
        self._base: SnapshotRef | None = None  # What the next snapshot is stored against, and `_tree` is of.
        self._next_number = 0
        self._staged: set[SnapshotId] = set()
        self.last_cut_at = clock.monotonic()

    def begin_life(self, life: Incarnation, checkpoint: Checkpoint, *, next_number: int) -> None:
        """From now on checkpoints are of this incarnation, which came from (or is after) that checkpoint."""
        self._life = life
        self._next_number = next_number
        self._newest = self._committed = checkpoint
        self._tree, self._base = life.tree, self._store.ref(checkpoint)
        _remove(life.clones)
        self.last_cut_at = self._clock.monotonic()

    async def first_commit(self) -> None:
        """Wait for the first checkpoint of this owner."""
        await self._first_commit.wait()

    def end_life(self) -> None:
        if self._life is not None and self._life.watch is not None:
            self._life.watch.close()
        self._life = None

    async def take(self, reason: str) -> None:
        """Make a checkpoint of now; returns when the agent runs on, the commit goes on behind.

        Whoever asks while a cut is on its way is served by the next one, together with all who asked by then. A failure
        is an event in the log, never the caller's: the session runs on and the older checkpoint stands.

        Raises:
            Superseded: another node owns the session now.
        """
        asked_before = self._cuts_begun
        async with self._cutting:
            if self._cuts_begun > asked_before:
                return
            # Only what changed since the last committed checkpoint is stored, and only one image is staged at a time:
            # turns that are quicker than a commit wait for it. The sandbox may die meanwhile.
            await self._waiting.join()
            if self._life is not None:
                async with AsyncExitStack() as still:
                    await self._take(self._life, reason, still, last=False)

    async def take_and_commit(self, reason: str) -> Checkpoint | None:
        """Make a checkpoint and wait until it is durable; None when it failed, which the log explains."""
        before = self._committed
        await self.take(reason)
        await self._waiting.join()
        return self._committed if self._committed is not before else None

    async def take_for(self, call: Call) -> Checkpoint | None:
        """A durable checkpoint that the agent asks for with this call, made now or before its node died.

        Raises:
            SandboxFailed: ("sandbox_gone") the sandbox that asks died meanwhile; the next one asks again.
        """
        for found in reversed(await self._records.checkpoints()):
            if holds_barrier(found, call.call_id):
                return found
        life = self._life
        made = await self.take_and_commit("agent")
        if made is not None and made.seq >= call.intended_seq:
            return made
        if life is None or self._life is not life:
            raise SandboxFailed("sandbox_gone", f"cannot make a checkpoint for {call.call_id}: its sandbox is gone")
        return None

    async def take_last(self, reason: str) -> Checkpoint | None:
        """Make the checkpoint that this life ends with, and wait until it is durable.

        From its cut on the sandbox stays paused and its link silent: the caller destroys it. None when it failed, which
        the log explains: then the agent runs on.
        """
        async with self._cutting:
            await self._waiting.join()
            life, before = self._life, self._committed
            if life is None:
                return None
            async with AsyncExitStack() as still:
                await self._take(life, reason, still, last=True)
                await self._waiting.join()
                if self._committed is before:
                    return None
                still.pop_all()
            self.end_life()
            return self._committed

    async def commit_forever(self) -> None:
        """Commit what was cut, in order; runs beside the session."""
        while True:
            cut = await self._waiting.get()
            try:
                await self._commit(cut)
                await self._forget_old()
            except Superseded:
                raise
            except (TorporError, OSError) as error:
                # What the capture was compared with may be what is damaged: read the whole workspace next time.
                self._tree, self._base = None, self._committed and self._store.ref(self._committed)
                self._discard(cut.checkpoint.snapshot_id)
                _remove(cut.clones)
                logger.warning("checkpoint not committed: %s", error)
                await self._records.checkpoint_failed(cut.checkpoint.incarnation, cut.checkpoint.reason, error)
            finally:
                self._waiting.task_done()

    def lease(self) -> AbstractAsyncContextManager[Lease]:
        """For `final_files`: hold it until that is committed."""
        return self._store.lease()

    async def final_files(self, life: Incarnation, lease: Lease) -> Checkpoint:
        """The workspace as the agent left it, stored and not yet committed; nothing runs in the sandbox any more."""
        wall_ns = self._clock.wall_ns()
        snapshot_id = new_snapshot_id(wall_ns)
        self._staging.begin(snapshot_id, 0)
        seq, cursor_seq = await self._records.position()
        changes, image = self._staging.changes(snapshot_id), self._staging.image(snapshot_id)
        workspace = await asyncio.to_thread(capture, life.plan.workspace, changes, self._tree)
        saved = await asyncio.to_thread(
            self._store.save,
            image_dir=image,
            workspace=workspace,
            parent=self._base,
            pins=life.pins,
            snapshot_id=snapshot_id,
            lease=lease,
        )
        self._discard(snapshot_id)
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

    def _discard(self, snapshot_id: SnapshotId) -> None:
        self._staged.discard(snapshot_id)
        self._staging.discard(snapshot_id)

    async def settle(self) -> None:
        """Wait until everything that was cut, or is being cut, is committed or has failed."""
        async with self._cutting:
            await self._waiting.join()

    async def _take(self, life: Incarnation, reason: str, still: AsyncExitStack, *, last: bool) -> None:
        """Cut, and hand over to the commit."""
        self._cuts_begun += 1
        snapshot_id = new_snapshot_id(self._clock.wall_ns())
        self._staged.add(snapshot_id)
        try:
            cut = await self._cut(life, snapshot_id, reason, still, last=last)
        except Superseded:
            raise
        except (TorporError, OSError) as error:
            self._discard(snapshot_id)
            _remove(life.clones)
            logger.warning("no checkpoint: %s", error)
            await still.aclose()
            await self._records.checkpoint_failed(life.number, reason, error)
            return
        await self._waiting.put(cut)

    async def _cut(
        self, life: Incarnation, snapshot_id: SnapshotId, reason: str, still: AsyncExitStack, *, last: bool
    ) -> Cut:
        """Closing `still` lets link and agent run on, which is done here unless it is the last cut of a life."""
        previous = self._newest
        self._staging.begin(snapshot_id, previous.raw_bytes if previous else 0)
        status = await life.link.cut(CUT_DEADLINE_SECONDS)
        still.callback(life.link.release)
        async with self._gateway.quiet():
            seq, cursor_seq = await self._records.position()
            streams = open_streams(status, self._gateway.open_streams())
            pending, joinable = self._gateway.pending_redo(), self._gateway.joinable()
        crash_point("checkpoint.cut")
        cut_wall_ns = self._clock.wall_ns()
        started = self._clock.monotonic()
        workspace = await self._freeze(life, snapshot_id, still)
        if not last:
            await still.aclose()
            crash_point("checkpoint.resumed")
        frozen = self._clock.monotonic() - started
        self._staging.complete(snapshot_id)
        self.last_cut_at = self._clock.monotonic()
        image = self._staging.image(snapshot_id)
        output = {stream.stream: stream.read for stream in status.streams}
        checkpoint = Checkpoint(
            checkpoint_id=new_checkpoint_id(cut_wall_ns),
            session_id=self._records.session_id,
            number=self._next_number,
            seq=seq,
            committed_seq=0,
            cursor_seq=cursor_seq,
            incarnation=life.number,
            snapshot_id=snapshot_id,
            manifest_digest="",
            has_memory=True,
            open_streams=streams,
            next_stream=status.next_stream,
            stdout_bytes=output.get(STDOUT, 0),
            stderr_bytes=output.get(STDERR, 0),
            reason=reason,
            wall_ns=cut_wall_ns,
            freeze_ns=round(frozen * 1e9),
            commit_ns=0,
            raw_bytes=sum(file.stat().st_size for file in image.iterdir()),
            stored_bytes=0,
            pending_redo=pending,
            joinable=joinable,
        )
        self._newest = checkpoint
        self._next_number += 1
        return Cut(checkpoint=checkpoint, workspace=workspace, pins=life.pins, clones=life.clones)

    async def _freeze(self, life: Incarnation, snapshot_id: SnapshotId, still: AsyncExitStack) -> TreeCapture:
        """Pause, image, workspace: until `still` is closed the agent stands still."""
        life.paused_mark.touch()
        await life.sandbox.pause()
        still.push_async_callback(_thaw, life)
        crash_point("checkpoint.paused")
        await life.sandbox.save_image(self._staging.image(snapshot_id))
        crash_point("checkpoint.imaged")
        return await asyncio.to_thread(self._capture, life, self._staging.changes(snapshot_id))

    def _capture(self, life: Incarnation, changes: Path) -> TreeCapture:
        """What changed in the workspace; stores through a mapping move no time stamp, so open files are read anyway."""
        mapped = life.sandbox.open_for_writing()
        return capture(
            life.plan.workspace,
            changes,
            self._tree,
            always_reread=mapped,
            watch=life.watch,
            clones=life.clones,
        )

    async def _commit(self, cut: Cut) -> None:
        async with self._store.lease() as lease:
            await self._store_and_commit(cut, lease)
        snapshot_id = cut.checkpoint.snapshot_id
        self._staging.discard_changes(snapshot_id)
        _remove(cut.clones)
        self._staged.discard(snapshot_id)
        self._staging.keep_only({snapshot_id, *self._staged})
        self._first_commit.set()

    async def _store_and_commit(self, cut: Cut, lease: Lease) -> None:
        started = self._clock.monotonic()
        snapshot_id = cut.checkpoint.snapshot_id
        saved = await asyncio.to_thread(
            self._store.save,
            image_dir=self._staging.image(snapshot_id),
            workspace=cut.workspace,
            parent=self._base,
            pins=cut.pins,
            snapshot_id=snapshot_id,
            lease=lease,
        )
        self._tree, self._base = saved.tree, saved.ref
        crash_point("checkpoint.stored")
        checkpoint = replace(
            cut.checkpoint,
            manifest_digest=saved.manifest_digest,
            stored_bytes=saved.stored_bytes,
            commit_ns=round((self._clock.monotonic() - started) * 1e9),
        )
        is_first = self._committed is None or not self._committed.has_memory
        await asyncio.to_thread(lease.check)
        self._committed = await self._records.commit_checkpoint(checkpoint)
        crash_point("checkpoint.committed")
        if is_first:
            await self._share(saved.ref)

    async def _forget_old(self) -> None:
        """Apply the retention policy; not what the next snapshot is stored against, nor what is about to be."""
        in_use = {point.snapshot_id for point in (self._committed, self._newest) if point is not None}
        in_use |= {self._base.id} if self._base is not None else set()
        try:
            forgotten = await self._records.retain(self._retention, in_use=in_use, at_least=FORGOTTEN_AT_ONCE)
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


def _remove(clones: Path) -> None:
    """Clones are of one cut, and one cut at a time is staged. A kill -9 leaves them; the next life removes them."""
    shutil.rmtree(clones, ignore_errors=True)


async def _thaw(life: Incarnation) -> None:
    """Let the agent run on, even when the task that held it is cancelled."""
    await asyncio.shield(asyncio.ensure_future(_resume(life)))


async def _resume(life: Incarnation) -> None:
    """A sandbox that can't run on is destroyed: then its session recovers instead of hanging."""
    try:
        await life.sandbox.resume()
    except SandboxFailed:
        await life.sandbox.kill()
    life.paused_mark.unlink(missing_ok=True)


def files_checkpoint(
    saved: SavedSnapshot,
    *,
    session_id: SessionId,
    number: int,
    seq: int,
    cursor_seq: int,
    incarnation: int,
    reason: str,
    wall_ns: int,
) -> Checkpoint:
    """A checkpoint of files alone: before the agent started, or after it ended."""
    return Checkpoint(
        checkpoint_id=new_checkpoint_id(wall_ns),
        session_id=session_id,
        number=number,
        seq=seq,
        committed_seq=0,
        cursor_seq=cursor_seq,
        incarnation=incarnation,
        snapshot_id=saved.id,
        manifest_digest=saved.manifest_digest,
        has_memory=False,
        open_streams=(),
        next_stream=0,
        stdout_bytes=0,
        stderr_bytes=0,
        reason=reason,
        wall_ns=wall_ns,
        freeze_ns=0,
        commit_ns=round(saved.seconds * 1e9),
        raw_bytes=saved.raw_bytes,
        stored_bytes=saved.stored_bytes,
    )


def open_streams(status: GuestStatus, known: Mapping[StreamId, OpenCall]) -> tuple[OpenStream, ...]:
    """Join what the guest says of its open streams, who has the last word on positions, with their calls."""
    found: list[OpenStream] = []
    for stream in status.streams:
        attached = known.get(StreamId(stream.stream))
        if stream.kind != "call" or (stream.closed and attached is None):
            # A client that left keeps its stream here until its end is logged: its retry must find the call.
            continue
        found.append(
            OpenStream(
                stream=StreamId(stream.stream),
                port=stream.port,
                call_id=attached.call_id if attached else None,
                read=stream.read,
                acknowledged=stream.acknowledged,
                taken=stream.taken,
                untouched_bytes=attached.untouched_bytes if attached else 0,
                attempt=attached.attempt if attached else 1,
            )
        )
    return tuple(found)
