"""A store with rows that keep its snapshots, and the work that goes on in it as tasks: saves, restores, collections."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.memory import memory_directory
from tests.unit.snapshots.making import IDS, KEY, contents, variants
from tests.unit.snapshots.stepping import SteppedBackend, Task

from torpor.core.errors import Conflict
from torpor.core.ids import SnapshotId
from torpor.snapshots.backend import LocalDirectory
from torpor.snapshots.capture import capture
from torpor.snapshots.collect import Collector, Root
from torpor.snapshots.condemned import read_condemned
from torpor.snapshots.index_cache import IndexCache
from torpor.snapshots.manifest import load_head, manifest_key
from torpor.snapshots.repack import Repacker
from torpor.snapshots.store import SavedSnapshot, SnapshotStore

Work = Callable[[Task], None]


@dataclass
class Row:
    """A checkpoint, and what it must restore to."""

    session: str
    saved: SavedSnapshot
    image: dict[str, bytes]
    workspace: dict[str, bytes]


class Scene:
    """The store, and its rows, which are this object's own: there is no database."""

    def __init__(self) -> None:
        # In memory, where a sync costs nothing: what is tested here is order, and there are thousands of syncs.
        self._open = contextlib.ExitStack()
        self.root = self._open.enter_context(memory_directory())
        self.real = LocalDirectory(self.root / "store")
        self.rows: dict[SnapshotId, Row] = {}
        self.ever: list[SavedSnapshot] = []
        self.repacked = 0
        self._indexes = IndexCache()
        self._numbers = iter(range(10**6))

    def close(self) -> None:
        self._open.close()

    def fresh(self, name: str) -> Path:
        path = self.root / f"{name}{next(self._numbers)}"
        path.mkdir()
        return path

    def store(self, backend: Any) -> SnapshotStore:
        """All stores remember the same indexes, as those of one node do."""
        store = SnapshotStore(backend, IDS)
        store._cache = self._indexes
        return store

    def run(self, work: Work) -> None:
        Task("alone", work).finish()

    def save(self, session: str, first_page: int, *, knows: SavedSnapshot | None = None, length: int = 20) -> Work:
        """Save an image of `length` pages, as the child of the session's newest row.

        Args:
            knows: compare with this instead. Its row may be gone, and so may it: its index is still in memory.
        """
        number, image, workspace = next(self._numbers), self.fresh("image"), self.fresh("workspace")
        # Every third page is another version of it than its parent's: a delta.
        held = range(first_page, first_page + length)
        (image / "pages.img").write_bytes(variants((page, 0 if page % 3 else number + 1) for page in held))
        (image / "kernel.img").write_bytes(b"state %d" % first_page)
        (workspace / "new").write_bytes(b"%d" % number)
        (workspace / "old").write_bytes(b"%d" % (first_page // 30))

        def work(task: Task) -> None:
            backend = _Saving(self.real, task)
            store = self.store(backend)
            with store.lease() as lease:
                task.gate()
                mine = [row.saved for row in self.rows.values() if row.session == session]
                parent = knows or (mine[-1] if mine else None)
                saved = store.save(
                    image_dir=image,
                    workspace=capture(workspace, self.fresh("staging")),
                    parent=parent and parent.ref,
                    pins={},
                    snapshot_id=SnapshotId(f"snp_{number}"),
                    key=KEY,
                    lease=lease,
                )
                self._check_sharing(saved, parent, backend.condemned)
                lease.check()
                task.gate()
                self.rows[saved.id] = Row(session, saved, contents(image), contents(workspace))
                self.ever.append(saved)

        return work

    def _check_sharing(self, saved: SavedSnapshot, parent: SavedSnapshot | None, condemned: frozenset[str]) -> None:
        """What a row names is there, and is shared, unless the save found it on the condemned list.

        It may be there: without a grace period, packs of a save that is under way are condemned, and its row, which
        takes them off the list again, may be committed, and be a parent, before the sweep that reads it.
        """
        assert not condemned & {*load_head(self.real, saved.id, saved.manifest_digest).pack_names}
        if parent is not None and parent.id in self.rows:
            objects = {pack.key for pack in self.store(self.real).read_manifest(parent.ref).object_packs}
            assert bool(saved.parent_problem) == bool(condemned & objects), saved.parent_problem

    def restore(self, choice: int) -> Work:
        """Restore one of the rows that are there when the lease is taken."""
        image, workspace = self.fresh("restored") / "image", self.fresh("restored")

        def work(task: Task) -> None:
            store = self.store(SteppedBackend(self.real, task))
            with store.lease():
                task.gate()
                if not self.rows:
                    return
                row = list(self.rows.values())[choice % len(self.rows)]
                store.restore_image(row.saved.ref, image)
                store.restore_workspace(row.saved.ref, workspace)
                assert contents(image) == row.image
                assert contents(workspace) == row.workspace

        return work

    def collect(self) -> Work:
        """Without any grace period: leases alone have to protect what is under way."""

        def work(task: Task) -> None:
            backend: Any = SteppedBackend(self.real, task)
            try:
                with backend.leases.hold_alone() as alone:
                    collector = Collector(backend, _Roots(self.rows, task), alone, grace_seconds=0)
                    collector.sweep()
                    self._repack(backend, task)
                    collector.condemn(collector.plan())
                    collector.sweep()
            except Conflict as refused:
                assert refused.code == "collect_running"

        return work

    @contextlib.contextmanager
    def _room(self, _raw_bytes: int) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.root) as made:
            yield Path(made)

    def _repack(self, backend: Any, task: Task) -> None:
        """Every pack of which something is dead, and the rows one by one."""
        task.gate()
        rows = dict(self.rows)
        repacker = Repacker(backend, IDS, grace_seconds=0, progress=lambda *_: None, room=self._room)
        repacker.look([row.saved.ref for row in rows.values()], newest=[one.saved.ref.id for one in rows.values()])
        self.repacked += len(repacker.weights) + len(repacker.scattered)
        with backend.leases.hold() as lease:
            for one in repacker.write(lambda: SnapshotId(f"snp_{next(self._numbers)}"), lease):
                task.gate()
                row = self.rows.pop(one.old.id, None)
                if row is not None:
                    self.rows[one.new.id] = replace(row, saved=replace(row.saved, ref=one.new))

    def check(self) -> None:
        """Everything that a row needs is there."""
        for snapshot_id, row in self.rows.items():
            for key in load_head(self.real, snapshot_id, row.saved.manifest_digest).pack_names:
                assert self.real.exists(key), f"{snapshot_id} lost {key}"

    def check_at_rest(self) -> None:
        """Nobody is under way: every row restores, and one collection leaves nothing that no row needs."""
        self.run(self.collect())
        store = self.store(self.real)
        for row in self.rows.values():
            assert store.verify(row.saved.ref) == []
        needed = {manifest_key(snapshot_id) for snapshot_id in self.rows}.union(
            *(load_head(self.real, snapshot_id, None).pack_names for snapshot_id in self.rows)
        )
        assert set(self.real.list("")) == needed
        assert read_condemned(self.real) == set()
        assert self.real.leases.held() == set()


class _Saving(SteppedBackend):
    """A save's: it knows what that read as the condemned list."""

    condemned: frozenset[str] = frozenset()

    def get(self, key: str) -> bytes:
        found: bytes = self.__getattr__("get")(key)
        if key.startswith("condemned/"):
            self.condemned = frozenset(found.decode().split("\n"))
        return found


class _Roots:
    def __init__(self, rows: dict[SnapshotId, Row], task: Task) -> None:
        self._rows = rows
        self._task = task

    def manifests(self) -> dict[str, Root]:
        self._task.gate()
        return {manifest_key(key): Root(row.saved.manifest_digest, str(key)) for key, row in self._rows.items()}

    def sync(self) -> None:
        self._task.gate()
