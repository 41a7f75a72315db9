"""What a restore reads of many packs is read by several threads, which matters where a read takes a while."""

import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.unit.snapshots.making import IDS, World, contents

from torpor.core.errors import Damaged
from torpor.snapshots.store import SavedSnapshot, SnapshotStore

AT_ONCE = 4
PATIENCE_SECONDS = 30.0


class Meeting:
    """A backend whose reads of one kind wait for each other: so many have to be under way before the first returns.

    The barrier's patience only bounds what a reader that comes alone would wait; it is broken then, and stays so.
    """

    def __init__(self, inner: Any, is_met: Any, *, alone: int = 0) -> None:
        """The first `alone` of them wait for nobody."""
        self._inner = inner
        self._is_met = is_met
        self._barrier = threading.Barrier(AT_ONCE)
        self._alone = alone
        self._waiting = 0
        self._lock = threading.Lock()
        self.met = 0
        self.reads: Counter[tuple[str, int]] = Counter()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._lock:
            self.reads[key, start] += 1
        if self._is_met(start) and self._waits():
            self._barrier.wait(PATIENCE_SECONDS)
            self.met = AT_ONCE
        return self._inner.get_range(key, start, length)

    def _waits(self) -> bool:
        """The first so many, and none after them, which might be too few to meet."""
        with self._lock:
            self._waiting += sum(self.reads.values()) > self._alone
            return 0 < self._waiting <= AT_ONCE

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def many_saves(world: World, count: int = 12) -> SavedSnapshot:
    """Each adds a directory of two files, and so a pack."""
    saved: SavedSnapshot | None = None
    for number in range(count):
        directory = world.workspace / f"d{number}"
        directory.mkdir()
        (directory / "small").write_bytes(os.urandom(3000))
        (directory / "big").write_bytes(os.urandom(700_000))
        saved = world.save(str(number), saved, index=saved and saved.tree)
    assert saved is not None
    return saved


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_contents_of_a_workspace_are_read_several_at_a_time(world: World) -> None:
    saved = many_saves(world)
    # The last pack's index, and the root directory, come first.
    backend = Meeting(world.backend, lambda start: start > 0, alone=2)
    target = world.fresh("restored")
    SnapshotStore(backend, IDS).restore_workspace(saved.ref, target)
    assert backend.met >= AT_ONCE
    assert files_of(target) == files_of(world.workspace)
    assert max(backend.reads.values()) == 1


def test_indexes_of_many_packs_are_read_several_at_a_time(world: World) -> None:
    saved = many_saves(world)
    backend = Meeting(world.backend, lambda start: start == 0)
    store = SnapshotStore(backend, IDS)
    store._load_indexes(saved.ref)
    assert backend.met >= AT_ONCE


def test_export_over_files_that_are_there_reads_no_contents_twice(world: World) -> None:
    saved = many_saves(world)
    backend = Meeting(world.backend, lambda start: False)
    report = SnapshotStore(backend, IDS).export_workspace(saved.ref, world.workspace)
    assert report.written == []
    (world.workspace / "d3/small").write_bytes(b"changed")
    assert SnapshotStore(backend, IDS).export_workspace(saved.ref, world.workspace).written == [b"d3/small"]


def test_damaged_content_that_was_read_ahead_is_an_error_and_no_thread_stays(world: World) -> None:
    saved = many_saves(world)
    before = threading.active_count()
    for ref in world.store.read_manifest(saved.ref).object_packs[:3]:
        path = next((world.store_directory / "packs").glob(f"*/{ref.key.removeprefix('packs/')}"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(Damaged):
        world.new_store().restore_workspace(saved.ref, world.fresh("restored"))
    assert threading.active_count() == before


def test_image_reads_the_index_of_no_pack_that_it_does_not_need(world: World) -> None:
    world.write_image(os.urandom(40_960))
    saved = many_saves(world)
    backend = Meeting(world.backend, lambda start: False)
    SnapshotStore(backend, IDS).restore_image(saved.ref, world.root / "image-again")
    assert contents(world.root / "image-again") == contents(world.image)
    manifest = world.store.read_manifest(saved.ref)
    assert len(manifest.object_packs) == 12
    assert len({key for key, _ in backend.reads}) <= len(manifest.page_packs) + 12


def test_store_that_saved_a_snapshot_fills_its_workspace_without_reading_an_index(world: World) -> None:
    """After a death of the sandbox its node restores at once, and has them in memory."""
    store = world.new_store()
    backend = Meeting(world.backend, lambda start: False)
    store._backend = backend
    saved: SavedSnapshot | None = None
    for number in range(6):
        (world.workspace / f"file{number}").write_bytes(os.urandom(3000))
        saved = world.save(str(number), saved, index=saved and saved.tree, store=store)
    assert saved is not None
    backend.reads.clear()
    target = world.fresh("restored")
    store.restore_workspace(saved.ref, target)
    assert files_of(target) == files_of(world.workspace)
    assert [key for key, start in backend.reads if start == 0] == []
    world.new_store().restore_workspace(saved.ref, world.fresh("restored"))
