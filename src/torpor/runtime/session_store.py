"""The snapshot store as sessions use it: what a session saves is sealed with its own key, and it reads nothing else.

Joins the store, which knows no session, to the keys, which are read when the first one is asked for: most commands
look at the event log alone, and work without a master key.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from torpor.core.checkpoint import Checkpoint
from torpor.core.clock import Clock
from torpor.core.ids import SessionId, SnapshotId
from torpor.db.database import Database
from torpor.db.roots import Root
from torpor.db.sessions import Session
from torpor.runtime.home import Home
from torpor.runtime.keyring import Keyring, open_keyring
from torpor.runtime.master_key import MasterKeys
from torpor.runtime.spec import SessionSpec
from torpor.snapshots.backend import Backend
from torpor.snapshots.capture import TreeCapture
from torpor.snapshots.cipher import Key
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.diff import Change
from torpor.snapshots.lease import Lease
from torpor.snapshots.manifest import SnapshotRef
from torpor.snapshots.materialize import ExportReport
from torpor.snapshots.owners import Signature
from torpor.snapshots.shared import SharedIndexes
from torpor.snapshots.store import SavedSnapshot, SnapshotStore
from torpor.snapshots.tree import TreeIndex


class SessionStore:
    """One session's snapshots. Synchronous, as the store is; raises what it raises."""

    def __init__(self, store: SnapshotStore, key: Key, session_id: SessionId, shares: Sequence[str]) -> None:
        """Args:
        shares: names that this session has in common with those whose memory is like its own, the closest first.
        """
        self._store = store
        self._key = key
        self._session_id = session_id
        self._shares = shares

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncGenerator[Lease]:
        """Hold it from before a row is read that names what will be read, and until what was saved is committed."""
        held = await asyncio.to_thread(self._store.lease)
        try:
            yield held
        finally:
            await asyncio.to_thread(held.release)

    def ref(self, checkpoint: Checkpoint) -> SnapshotRef:
        return SnapshotRef(id=checkpoint.snapshot_id, manifest_digest=checkpoint.manifest_digest, key=self._key)

    def save(
        self,
        *,
        image_dir: Path,
        workspace: TreeCapture,
        parent: SnapshotRef | None,
        compared_with: SnapshotRef | None = None,
        pins: Mapping[str, str],
        snapshot_id: SnapshotId,
        lease: Lease,
    ) -> SavedSnapshot:
        return self._store.save(
            image_dir=image_dir,
            workspace=workspace,
            parent=parent,
            compared_with=compared_with,
            pins=pins,
            snapshot_id=snapshot_id,
            key=self._key,
            lease=lease,
            shares=self._shares,
        )

    def reseal(
        self,
        checkpoint: Checkpoint,
        others: Sequence[tuple[SnapshotId, Key]],
        *,
        lease: Lease,
        each: Callable[[int], None],
    ) -> list[SnapshotRef]:
        """Other sessions' own snapshots of what this one's checkpoint has: the same packs, and keys of their own."""
        return self._store.reseal(self.ref(checkpoint), others, lease=lease, each=each)

    def share(self, ref: SnapshotRef) -> None:
        """Let the first snapshots of sessions that are like this one be compared with this snapshot, once committed."""
        self._store.share(ref, self._shares, self._session_id)

    def pins(self, checkpoint: Checkpoint) -> Mapping[str, str]:
        """What the checkpoint's image needs of the machine."""
        return self._store.read_manifest(self.ref(checkpoint)).pins

    def restore_image(self, checkpoint: Checkpoint, destination: Path) -> None:
        self._store.restore_image(self.ref(checkpoint), destination)

    def restore_workspace(self, checkpoint: Checkpoint, destination: Path) -> TreeIndex:
        return self._store.restore_workspace(self.ref(checkpoint), destination)

    def export_workspace(self, checkpoint: Checkpoint, destination: Path) -> ExportReport:
        return self._store.export_workspace(self.ref(checkpoint), destination)

    def diff(self, before: Checkpoint, after: Checkpoint) -> list[Change]:
        return self._store.diff(self.ref(before), self.ref(after))


class SessionStores:
    """Every session's store of one TORPOR_HOME."""

    def __init__(self, home: Home, backend: Backend, database: Database, masters: MasterKeys, clock: Clock) -> None:
        self._home = home
        self.backend = backend
        self._database = database
        self._clock = clock
        self._keyring: Keyring | None = None
        self._store: SnapshotStore | None = None
        self.masters = masters

    async def keyring(self, *, anew: bool = False) -> Keyring:
        """The keys, opened once; `anew` after somebody has changed the master key.

        Raises:
            As `open_keyring`.
        """
        if self._keyring is None or anew:
            self._keyring = await open_keyring(self._database, self.masters)
        return self._keyring

    async def of(self, session: Session) -> SessionStore:
        """Raises:
        As `keyring` and `Keyring.session_key`.
        """
        spec = msgspec.convert(session.spec, SessionSpec)
        return await self.with_key(
            session.session_id, spec, await (await self.keyring()).session_key(session.session_id)
        )

    async def refs(self, found: Iterable[Root]) -> dict[SnapshotId, SnapshotRef]:
        """What it takes to read the snapshots of these rows.

        Raises:
            As `of`.
        """
        keyring, opened = await self.keyring(), dict[SessionId, Key]()
        refs: dict[SnapshotId, SnapshotRef] = {}
        for root in found:
            if root.session_id not in opened:
                opened[root.session_id] = await keyring.session_key(root.session_id)
            key = opened[root.session_id]
            refs[root.snapshot_id] = SnapshotRef(id=root.snapshot_id, manifest_digest=root.manifest_digest, key=key)
        return refs

    async def with_key(self, session_id: SessionId, spec: SessionSpec, key: Key) -> SessionStore:
        """The store of a session whose key is at hand."""
        return SessionStore(await self.store(), key, session_id, _shares(spec))

    async def store(self) -> SnapshotStore:
        """The store without any session's key. Nothing is asked of the backend for it, which may be down.

        Raises:
            As `keyring`.
        """
        if self._store is None:
            tenant = (await self.keyring()).tenant
            self._store = SnapshotStore(
                self.backend,
                ContentIds(tenant.secret),
                signature=Signature(self.backend, tenant.id),
                shared=SharedIndexes(self._home.shared_indexes, tenant.secret),
                clock=self._clock,
            )
        return self._store


def _shares(spec: SessionSpec) -> tuple[str, ...]:
    """Sessions of one image and command are most alike; next to that, those of one image and program."""
    return tuple(json.dumps([spec.image.digest, *words]) for words in (spec.argv, spec.argv[:1]))
