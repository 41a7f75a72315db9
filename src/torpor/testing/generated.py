"""Sessions that never ran: rows, log and snapshots as a node would have left them, made without any sandbox.

For tests and measurements of what looks at many snapshots. Nothing is imitated: sessions are created, checkpoints saved
and committed by the code that does it always; only the memory images are made up.
"""

import asyncio
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torpor.core.checkpoint import Checkpoint
from torpor.core.ids import SessionId, new_snapshot_id
from torpor.db.database import Transaction
from torpor.runtime import leasing
from torpor.runtime.checkpointing import files_checkpoint
from torpor.runtime.records import Records
from torpor.runtime.request import Request
from torpor.runtime.runtime import Runtime
from torpor.runtime.session_store import SessionStore
from torpor.snapshots.capture import capture
from torpor.snapshots.manifest import SnapshotRef
from torpor.snapshots.tree import TreeIndex

PAGE_BYTES = 4096


class MadeUpMemory:
    """An image of some size that changes a little at each step, the same for the same seed.

    Half of each page is random: it compresses about as real memory does, by half.
    """

    def __init__(self, *, pages: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._image = bytearray()
        for _ in range(pages):
            self._image += self._page()

    def change(self, pages: int) -> None:
        """Most changes hit a few pages that are always busy; some hit any page, and one in ten steps moves them all."""
        count = len(self._image) // PAGE_BYTES
        for number in range(pages):
            busy = max(1, count // 20) if number % 4 else count
            self._put(self._random.randrange(busy))
        if self._random.randrange(10) == 0:
            self._image = self._image[PAGE_BYTES:] + self._page()

    def write(self, path: Path) -> None:
        path.write_bytes(self._image)

    def _put(self, page: int) -> None:
        self._image[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = self._page()

    def _page(self) -> bytes:
        return self._random.randbytes(PAGE_BYTES // 2) + bytes(PAGE_BYTES // 2)


class GeneratedSession:
    """One session with its memory and workspace. Build it with `generate_session`."""

    def __init__(self, records: Records, store: SessionStore, lock: leasing.SessionLock, scratch: Path) -> None:
        self._records = records
        self._store = store
        self._lock = lock
        self._scratch = scratch
        self._number = 0
        self._base: SnapshotRef | None = None
        self._tree: TreeIndex | None = None
        self.workspace = scratch / "workspace"
        self.image = scratch / "image"
        for directory in (self.workspace, self.image):
            directory.mkdir(parents=True)

    @property
    def session_id(self) -> SessionId:
        return self._records.session_id

    async def checkpoint(
        self,
        *,
        wall_ns: int,
        image: Path | None = None,
        workspace: Path | None = None,
        pins: Mapping[str, str] | None = None,
    ) -> Checkpoint:
        """Save and commit what lies in `image` and `workspace` now, or in other directories.

        Args:
            pins: what the image needs of a machine; a made-up one needs nothing.
        """
        self._number += 1
        staging = self._scratch / "staging"
        staging.mkdir()
        seq, cursor_seq = await self._records.position()
        async with self._store.lease() as lease:
            saved = await asyncio.to_thread(
                self._store.save,
                image_dir=image or self.image,
                workspace=capture(workspace or self.workspace, staging, self._tree),
                parent=self._base,
                pins=pins or {},
                snapshot_id=new_snapshot_id(wall_ns),
                lease=lease,
            )
            point = files_checkpoint(
                saved,
                session_id=self.session_id,
                number=self._number,
                seq=seq,
                cursor_seq=cursor_seq,
                incarnation=0,
                reason="call",
                wall_ns=wall_ns,
            )
            made = await self._records.commit_checkpoint(replace(point, has_memory=True))
        shutil.rmtree(staging)
        if self._number == 1:
            await asyncio.to_thread(self._store.share, saved.ref)
        self._base, self._tree = saved.ref, saved.tree
        return made

    async def close(self) -> None:
        """Let go of the session; what it saved stays."""
        await self._records.release()
        self._lock.release()
        shutil.rmtree(self._scratch)


async def generate_session(
    runtime: Runtime, me: leasing.Holder, scratch: Path, *, name: str | None = None
) -> GeneratedSession:
    """Create a session with an empty workspace, and own it as a node would."""
    source = scratch / "source"
    source.mkdir(parents=True)
    request = Request(argv=("true",), name=name, image="host", workspace=source, environment={})
    session = await runtime.create(request, {"PATH": "/usr/bin:/bin"})
    lock = leasing.acquire_free_lock(runtime.home.lock(session.session_id), me)
    assert lock is not None, "nobody else knows of it"

    def acquire(tx: Transaction) -> int:
        return leasing.acquire(tx, session, me, wall_ns=runtime.clock.wall_ns())

    token = await runtime.database.write(acquire, durable=False)
    records = Records(database=runtime.database, session_id=session.session_id, owner_token=token, clock=runtime.clock)
    return GeneratedSession(records, await runtime.stores.of(session), lock, scratch / "session")
