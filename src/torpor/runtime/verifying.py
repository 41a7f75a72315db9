"""`torpor verify`: whether every checkpoint's snapshot would restore, and what else lies in the store.

It reads and changes nothing; a reader's lease keeps collectors away. The log has a check of its own (`db.verify`).
"""

import asyncio
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torpor.core.errors import NotFound
from torpor.core.ids import SessionId, SnapshotId
from torpor.db import blobs, roots
from torpor.db.database import Database
from torpor.db.roots import Root
from torpor.runtime.session_store import SessionStores
from torpor.snapshots.backend import Backend
from torpor.snapshots.collect import Progress
from torpor.snapshots.garbage import Listing
from torpor.snapshots.manifest import SnapshotRef
from torpor.snapshots.verify import Verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreProblem:
    """One thing that is wrong, and whose it is; nobody's, of an object that no version of Torpor puts."""

    session_id: SessionId | None
    checkpoint: int | None
    text: str


@dataclass(slots=True, kw_only=True)
class StoreReport:
    """What was looked at.

    Attributes:
        garbage, garbage_bytes: objects that nothing needs, which is no problem.
    """

    checkpoints: int = 0
    packs: int = 0
    blobs: int = 0
    garbage: int = 0
    garbage_bytes: int = 0
    problems: list[StoreProblem] = field(default_factory=list[StoreProblem])


async def verify_store(
    database: Database,
    stores: SessionStores,
    blob_store: Backend,
    session_id: SessionId | None,
    progress: Progress,
    *,
    read_data: bool,
) -> StoreReport:
    """Look at every checkpoint of a session, or of all, and then at all objects.

    Raises:
        MachineUnfit, Conflict, Damaged: the keys can't be had, or the store can't be read.
    """
    store = await stores.store()
    lease = await asyncio.to_thread(store.lease)
    try:
        # Before the rows are read: what somebody saves meanwhile is not taken for garbage.
        listing = await asyncio.to_thread(_list_all, stores.backend, blob_store) if session_id is None else None
        found = [root for root in await database.read(roots.list_roots) if session_id in (None, root.session_id)]
        refs = await stores.refs(found)
        named = await database.read(
            lambda tx: blobs.list_named(tx) if session_id is None else blobs.list_named_of(tx, session_id)
        )
        verifier = await asyncio.to_thread(lambda: store.verifier(read_data=read_data))
        looking = _Looking(blob_store, verifier, progress, read_data=read_data)
        await asyncio.to_thread(looking.at_checkpoints, found, refs)
        await asyncio.to_thread(looking.at_blobs, sorted(named))
        if listing is not None:
            looking.at_the_rest(listing, named)
    finally:
        await asyncio.to_thread(lease.release)
    return looking.report


def _list_all(backend: Backend, blob_store: Backend) -> Listing:
    """The snapshots' objects and the log's, which may lie apart."""
    entries = {entry.key: entry for entry in [*backend.entries(""), *blob_store.entries("blobs/")]}
    return Listing.of(entries.values(), backend.now_ns())


class _Looking:
    """The part that blocks."""

    def __init__(self, blob_store: Backend, verifier: Verifier, progress: Progress, *, read_data: bool) -> None:
        self._blob_store = blob_store
        self._verifier = verifier
        self._progress = progress
        self._read_data = read_data
        self.report = StoreReport()

    def at_checkpoints(self, found: Sequence[Root], refs: Mapping[SnapshotId, SnapshotRef]) -> None:
        for done, root in enumerate(found, 1):
            for text in self._verifier.problems_of(refs[root.snapshot_id]):
                problem = StoreProblem(session_id=root.session_id, checkpoint=root.number, text=text)
                self.report.problems.append(problem)
            self._progress("looking at checkpoints", done, len(found))
        self.report.checkpoints = len(found)
        self.report.packs = sum(key.startswith("packs/") for key in self._verifier.named)

    def at_blobs(self, named: Sequence[str]) -> None:
        for done, key in enumerate(named, 1):
            reason = self._problem_of_blob(key)
            if reason:
                owner = SessionId("ses_" + key.removeprefix("blobs/").partition("_")[0])
                self.report.problems.append(StoreProblem(session_id=owner, checkpoint=None, text=reason))
            self._progress("looking at bodies", done, len(named))
        self.report.blobs = len(named)

    def at_the_rest(self, listing: Listing, blobs_named: Collection[str]) -> None:
        """Everything is needed, or garbage, or strange."""
        for entry in listing.unknown:
            text = f"{entry.key} is no object of Torpor's"
            self.report.problems.append(StoreProblem(session_id=None, checkpoint=None, text=text))
        needed = self._verifier.named | set(blobs_named)
        for kind in (listing.manifests, listing.packs, listing.probes, listing.blobs):
            for key, entry in kind.items():
                if key not in needed:
                    self.report.garbage += 1
                    self.report.garbage_bytes += entry.stored_bytes

    def _problem_of_blob(self, key: str) -> str:
        if not self._read_data:
            return "" if self._blob_store.exists(key) else f"cannot read {key}: it is not in the store"
        try:
            data = self._blob_store.get(key)
        except NotFound:
            return f"cannot read {key}: it is not in the store"
        is_whole = hashlib.sha256(data).hexdigest() == key.rpartition("_")[2]
        return "" if is_whole else f"cannot read {key}: it is not what was written"
