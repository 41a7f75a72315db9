"""The repacking part of `torpor collect`: which packs, then new snapshots, then the rows that name them.

Order and crash points are in docs/collecting.md. It reads every snapshot, so it needs the keys: without them nothing is
repacked, and everything else of a collection goes on.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torpor.core.clock import Clock
from torpor.core.crash import crash_point
from torpor.core.errors import NotFound, Superseded, TorporError
from torpor.core.ids import SessionId, SnapshotId, new_snapshot_id
from torpor.db import roots
from torpor.db.database import Database
from torpor.db.roots import Move, Root
from torpor.runtime.holding import Holding
from torpor.runtime.home import Home
from torpor.runtime.session_store import SessionStores
from torpor.runtime.staging import Staging
from torpor.snapshots.collect import Progress
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.repack import Repacked, Repacker

MOVES_AT_ONCE = 500
"""One message to a node is one line of bounded length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepackReport:
    """Packs that were written anew, images laid side by side, checkpoints that name another snapshot for that, bytes
    written; or why not.
    """

    packs: int = 0
    images: int = 0
    checkpoints: int = 0
    stored_bytes: int = 0
    note: str = ""


class Repacking:
    """One look at every snapshot, and what follows from it. The caller holds the collector's lease."""

    def __init__(
        self,
        *,
        home: Home,
        database: Database,
        stores: SessionStores,
        holding: Holding,
        grace_seconds: float,
        progress: Progress,
        clock: Clock,
    ) -> None:
        self._home = home
        self._database = database
        self._stores = stores
        self._backend = stores.backend
        self._holding = holding
        self._grace_seconds = grace_seconds
        self._progress = progress
        self._clock = clock

    async def run(self) -> RepackReport:
        found = await self._database.read(roots.list_roots)
        if not found:
            return RepackReport()
        try:
            ids = ContentIds((await self._stores.keyring()).tenant.secret)
            refs = list((await self._stores.refs(found)).values())
            fixed = await self._in_use(found)
            repacker = Repacker(
                self._backend, ids, grace_seconds=self._grace_seconds, progress=self._progress, room=self._room
            )
            await asyncio.to_thread(repacker.look, refs, fixed, _newest(found))
        except TorporError as error:
            return RepackReport(note=f"nothing was repacked: {error}")
        if not repacker.weights and not repacker.scattered:
            return RepackReport()
        lease = await asyncio.to_thread(self._backend.leases.hold)
        try:
            made = await asyncio.to_thread(repacker.write, lambda: new_snapshot_id(self._clock.wall_ns()), lease)
            moved = await self._move(found, made)
        finally:
            await asyncio.to_thread(lease.release)
        return RepackReport(
            packs=len(repacker.weights),
            images=len(repacker.scattered),
            checkpoints=moved,
            stored_bytes=repacker.stored_bytes,
        )

    def _room(self, raw_bytes: int) -> contextlib.AbstractContextManager[Path]:
        """A memory-backed directory, as every image has that is on its way to or from the store."""
        return Staging(self._home.root, SessionId("repack")).room(SnapshotId("image"), raw_bytes)

    async def _in_use(self, found: Sequence[Root]) -> set[SnapshotId]:
        """What nodes compare their next snapshots with; of a node that does not say, everything."""
        in_use: set[SnapshotId] = set()
        for session_id in {root.session_id for root in found}:
            if self._holding.is_run(session_id):
                answer = await self._holding.ask(session_id, "in_use")
                if answer is None:
                    in_use |= {root.snapshot_id for root in found if root.session_id == session_id}
                else:
                    in_use |= set(answer["snapshots"])
        return in_use

    async def _move(self, found: Sequence[Root], made: Sequence[Repacked]) -> int:
        """Let the rows name the new snapshots, session by session; gives how many do."""
        made_of = {one.old.id: one for one in made}
        by_session: dict[SessionId, list[Move]] = defaultdict(list)
        for root in found:
            one = made_of.get(root.snapshot_id)
            if one is not None:
                move = Move(
                    checkpoint_id=root.checkpoint_id,
                    seen_id=root.snapshot_id,
                    snapshot_id=one.new.id,
                    manifest_digest=one.new.manifest_digest,
                )
                by_session[root.session_id].append(move)
        moved = 0
        for done, (session_id, moves) in enumerate(by_session.items(), 1):
            for start in range(0, len(moves), MOVES_AT_ONCE):
                moved += await self._move_some(session_id, moves[start : start + MOVES_AT_ONCE])
                crash_point("repack.moved")
            self._progress("moving checkpoints", done, len(by_session))
        return moved

    async def _move_some(self, session_id: SessionId, moves: Sequence[Move]) -> int:
        with contextlib.suppress(Superseded, NotFound):
            async with self._holding.owned(session_id) as records:
                if records is None:
                    answer = await self._holding.ask(session_id, "move", moves=[asdict(move) for move in moves])
                    return 0 if answer is None else int(answer["moved"])
                moved = {point.snapshot_id for point in await records.move(moves)}
                staging = Staging(self._home.root, session_id)
                for move in moves:
                    if move.snapshot_id in moved:
                        staging.rename(move.seen_id, move.snapshot_id)
                return len(moved)
        return 0


def _newest(found: Sequence[Root]) -> set[SnapshotId]:
    """What a restore of each session would take, if nothing is wrong with it."""
    newest: dict[SessionId, Root] = {}
    for root in found:
        known = newest.get(root.session_id)
        if root.damage is None and (known is None or root.number > known.number):
            newest[root.session_id] = root
    return {root.snapshot_id for root in newest.values()}
