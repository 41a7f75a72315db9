"""What a restore fetched of an object store is fetched once, and never trusted more than the store."""

import os
import random
from pathlib import Path

import pytest
from tests.unit.snapshots.making import IDS, KEY

from torpor.core.errors import Damaged, NotFound
from torpor.core.ids import SnapshotId
from torpor.snapshots.backend import LocalDirectory
from torpor.snapshots.capture import capture
from torpor.snapshots.manifest import SnapshotRef
from torpor.snapshots.pack_cache import BLOCK_BYTES, PackCache
from torpor.snapshots.store import SnapshotStore

PACK = "packs/" + "ab" * 32
OTHER = "packs/" + "cd" * 32
DATA = random.Random(3).randbytes(3 * BLOCK_BYTES + 1000)


class Counting(LocalDirectory):
    """A store that knows what was asked of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.ranges: list[tuple[int, int]] = []

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self.ranges.append((start, length))
        return super().get_range(key, start, length)


@pytest.fixture
def store(tmp_path: Path) -> Counting:
    return Counting(tmp_path / "store")


def cache(store: Counting, tmp_path: Path, bytes_max: int = 1 << 30) -> PackCache:
    return PackCache(store, tmp_path / "cache", bytes_max=bytes_max)


def held(tmp_path: Path) -> int:
    return sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_a_range_is_fetched_once_by_all_processes_of_the_machine(store: Counting, tmp_path: Path) -> None:
    store.put(PACK, DATA)
    wanted = DATA[100_000 : BLOCK_BYTES + 100_000]
    for _ in range(2):
        assert cache(store, tmp_path).get_range(PACK, 100_000, BLOCK_BYTES) == wanted
    assert store.ranges == [(0, 2 * BLOCK_BYTES)]


def test_only_what_is_missing_is_fetched_neighbours_together(store: Counting, tmp_path: Path) -> None:
    store.put(PACK, DATA)
    cached = cache(store, tmp_path)
    cached.get_range(PACK, BLOCK_BYTES, 1)
    store.ranges.clear()
    assert cached.get_range(PACK, 0, len(DATA) + 5) == DATA
    assert store.ranges == [(0, BLOCK_BYTES), (2 * BLOCK_BYTES, 2 * BLOCK_BYTES)]


def test_what_this_machine_stored_needs_no_fetching(store: Counting, tmp_path: Path) -> None:
    assert cache(store, tmp_path).put(PACK, DATA)
    assert cache(store, tmp_path).get_range(PACK, 5, len(DATA)) == DATA[5:]
    assert store.ranges == []


@pytest.mark.parametrize("harm", ["cut short", "changed", "emptied"])
def test_a_block_that_is_not_what_was_written_is_fetched_again(store: Counting, tmp_path: Path, harm: str) -> None:
    cached = cache(store, tmp_path)
    cached.put(PACK, DATA)
    [block] = (tmp_path / "cache").rglob("*-1")
    content = bytearray(block.read_bytes())
    if harm == "changed":
        content[-1] ^= 1
    else:
        del content[100 if harm == "cut short" else 0 :]
    block.write_bytes(content)
    for _ in range(2):
        assert cached.get_range(PACK, 0, len(DATA)) == DATA
    assert store.ranges == [(BLOCK_BYTES, BLOCK_BYTES)]


def test_whole_objects_and_whether_they_are_there_come_from_the_store(store: Counting, tmp_path: Path) -> None:
    """So a verification sees what a restore elsewhere would find."""
    cached = cache(store, tmp_path)
    cached.put(PACK, DATA)
    store.delete(PACK)
    assert cached.absent([PACK]) == {PACK}
    with pytest.raises(NotFound):
        cached.get(PACK)


def test_what_was_deleted_is_not_read_any_more(store: Counting, tmp_path: Path) -> None:
    cached = cache(store, tmp_path)
    for key in (PACK, OTHER):
        cached.put(key, DATA)
    cached.delete(PACK)
    cached.delete_many([OTHER])
    for key in (PACK, OTHER):
        with pytest.raises(NotFound):
            cached.get_range(key, 0, 10)
    assert held(tmp_path) == 0


def test_the_least_lately_used_goes_beyond_the_limit(store: Counting, tmp_path: Path) -> None:
    cached = cache(store, tmp_path, bytes_max=8 * BLOCK_BYTES)
    cached.put(PACK, DATA)
    cached.put(OTHER, DATA)
    for number, path in enumerate(sorted((tmp_path / "cache").rglob("*-*"))):
        os.utime(path, (number, number))
    cached.get_range(PACK, 0, len(DATA))
    cached.put("packs/" + "ef" * 32, DATA)
    assert held(tmp_path) <= 8 * BLOCK_BYTES
    store.ranges.clear()
    assert cached.get_range(PACK, 0, len(DATA)) == DATA
    assert store.ranges == []
    cached.get_range(OTHER, 0, len(DATA))
    assert store.ranges != []


def test_a_disk_that_takes_nothing_costs_time_alone(store: Counting, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    cached = cache(store, tmp_path)
    assert cached.put(PACK, DATA)
    for _ in range(2):
        assert cached.get_range(PACK, 0, len(DATA)) == DATA
    assert len(store.ranges) == 2


def saved_image(cached: PackCache, tmp_path: Path) -> tuple[SnapshotStore, SnapshotRef, bytes]:
    """A snapshot that another machine saved, and its image."""
    for name in ("image", "workspace", "aside"):
        (tmp_path / name).mkdir()
    pages = random.Random(5).randbytes(6_000_000)
    (tmp_path / "image/pages.img").write_bytes(pages)
    store = SnapshotStore(cached, IDS)
    with store.lease() as lease:
        saved = store.save(
            image_dir=tmp_path / "image",
            workspace=capture(tmp_path / "workspace", tmp_path / "aside"),
            parent=None,
            pins={},
            snapshot_id=SnapshotId("snp_1"),
            key=KEY,
            lease=lease,
        )
    return store, saved.ref, pages


def test_a_second_restore_reads_the_same_image_and_asks_the_store_for_no_pack(store: Counting, tmp_path: Path) -> None:
    _, ref, pages = saved_image(PackCache(store, tmp_path / "elsewhere", bytes_max=1 << 30), tmp_path)
    here = SnapshotStore(cache(store, tmp_path), IDS)
    for number in range(2):
        store.ranges.clear()
        here.restore_image(ref, tmp_path / f"restored-{number}")
        assert (tmp_path / f"restored-{number}/pages.img").read_bytes() == pages
        assert bool(store.ranges) == (number == 0)


def test_damage_in_the_store_is_no_less_damage_behind_a_cache(store: Counting, tmp_path: Path) -> None:
    _, ref, _ = saved_image(PackCache(store, tmp_path / "elsewhere", bytes_max=1 << 30), tmp_path)
    largest = max((tmp_path / "store/packs").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    here = SnapshotStore(cache(store, tmp_path), IDS)
    for number in range(2):
        with pytest.raises(Damaged):
            here.restore_image(ref, tmp_path / f"restored-{number}")
