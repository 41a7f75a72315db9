"""Makes one cut: link, log, memory and workspace of one instant, staged in memory and not committed.

Order, and what a kill -9 between any two steps leaves (RECOVERY section 3; the names are crash points):

    hold delivery, BARRIER, note the log's head
        `checkpoint.cut`       the sandbox waits at the barrier; the next node's HELLO ends it
    mark the sandbox as paused, pause
        `checkpoint.paused`    the next node finds the mark and resumes the sandbox before it adopts it
    image to memory, workspace changes to staging
        `checkpoint.imaged`    as above; the staging directory is garbage
    resume, remove the mark, RELEASE
        `checkpoint.resumed`   the staging directory and the cut's clones are garbage, nothing else happened

The last cut of a life leaves out the resume (RECOVERY section 8): what the agent did after it would be lost with the
sandbox, so it does nothing. A kill -9 leaves the sandbox paused with its mark, as after a pause.
"""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from torpor.core.checkpoint import Checkpoint, OpenStream
from torpor.core.clock import Clock
from torpor.core.crash import crash_point
from torpor.core.errors import SandboxFailed
from torpor.core.ids import SessionId, SnapshotId, StreamId, new_checkpoint_id
from torpor.core.pins import Pins
from torpor.gateway.server import Gateway, OpenCall
from torpor.runtime.incarnation import Incarnation
from torpor.runtime.records import Records
from torpor.runtime.staging import Staging
from torpor.sandbox.frames import GuestStatus
from torpor.snapshots.capture import TreeCapture, capture
from torpor.snapshots.manifest import SnapshotRef
from torpor.snapshots.store import SavedSnapshot
from torpor.snapshots.tree import TreeIndex

CUT_DEADLINE_SECONDS = 20
STDOUT, STDERR = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What a capture is compared with: the newest *committed* tree, and its snapshot; nothing reads everything.

    Never a capture that only waits for its commit: that may be overtaken or fail, and what was left out as unchanged
    would be nowhere.
    """

    tree: TreeIndex | None = None
    ref: SnapshotRef | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A checkpoint that is taken but not committed: its image and changed files are staged in memory.

    Attributes:
        base: what `workspace` shares its unchanged files with.
        pins: what the image needs to be restored.
        clones: where big files of this cut were cloned to.
        ended_at: when the agent ran on, by the monotonic clock; of the last cut of a life, when all was staged.
    """

    checkpoint: Checkpoint
    workspace: TreeCapture
    base: Base
    pins: Pins
    clones: Path
    ended_at: float

    @property
    def broke_into_an_answer(self) -> bool:
        """Whether some stream had part of its answer: then the agent lost the whole freeze, whatever else it awaits."""
        return any(stream.taken > stream.untouched_bytes for stream in self.checkpoint.open_streams)


class Cutter:
    """Cuts one session; one cut at a time, which is the caller's to see to."""

    def __init__(self, *, records: Records, staging: Staging, gateway: Gateway, clock: Clock) -> None:
        self._records = records
        self._staging = staging
        self._gateway = gateway
        self._clock = clock

    async def cut(
        self,
        life: Incarnation,
        snapshot_id: SnapshotId,
        base: Base,
        still: AsyncExitStack,
        *,
        number: int,
        reason: str,
        last: bool,
    ) -> Cut:
        """Closing `still` lets link and agent run on, which is done here unless it is the last cut of a life.

        Raises:
            SandboxFailed, MachineUnfit, OSError: there is no cut; the caller closes `still` and frees what is staged.
        """
        status = await life.link.cut(CUT_DEADLINE_SECONDS)
        still.callback(life.link.release)
        async with self._gateway.quiet():
            seq, cursor_seq = await self._records.position()
            streams = open_streams(status, self._gateway.open_streams())
            pending, joinable = self._gateway.pending_redo(), self._gateway.joinable()
        crash_point("checkpoint.cut")
        wall_ns, started = self._clock.wall_ns(), self._clock.monotonic()
        workspace = await self._freeze(life, snapshot_id, base, still)
        if not last:
            await still.aclose()
            crash_point("checkpoint.resumed")
        ended_at = self._clock.monotonic()
        self._staging.complete(snapshot_id)
        output = {stream.stream: stream.read for stream in status.streams}
        checkpoint = Checkpoint(
            checkpoint_id=new_checkpoint_id(wall_ns),
            session_id=self._records.session_id,
            number=number,
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
            wall_ns=wall_ns,
            freeze_ns=round((ended_at - started) * 1e9),
            commit_ns=0,
            raw_bytes=sum(file.stat().st_size for file in self._staging.image(snapshot_id).iterdir()),
            stored_bytes=0,
            pending_redo=pending,
            joinable=joinable,
        )
        return Cut(
            checkpoint=checkpoint,
            workspace=workspace,
            base=base,
            pins=life.pins,
            clones=life.clones / snapshot_id,
            ended_at=ended_at,
        )

    async def _freeze(
        self, life: Incarnation, snapshot_id: SnapshotId, base: Base, still: AsyncExitStack
    ) -> TreeCapture:
        """Pause, image, workspace: until `still` is closed the agent stands still."""
        life.paused_mark.touch()
        await life.sandbox.pause()
        still.push_async_callback(_thaw, life)
        crash_point("checkpoint.paused")
        await life.sandbox.save_image(self._staging.image(snapshot_id))
        crash_point("checkpoint.imaged")
        changes, clones = self._staging.changes(snapshot_id), life.clones / snapshot_id
        return await asyncio.to_thread(_capture, life, changes, clones, base)


def _capture(life: Incarnation, changes: Path, clones: Path, base: Base) -> TreeCapture:
    """What changed in the workspace; stores through a mapping move no time stamp, so open files are read anyway."""
    open_files = life.sandbox.open_for_writing()
    return capture(life.plan.workspace, changes, base.tree, always_reread=open_files, watch=life.watch, clones=clones)


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
