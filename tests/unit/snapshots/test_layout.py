"""An image that many saves have scattered, laid side by side: the same bytes, by as many reads as a first snapshot."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.unit.snapshots.making import IDS, World, pages

from torpor.core.errors import Damaged, MachineUnfit
from torpor.core.ids import SnapshotId
from torpor.snapshots import layout
from torpor.snapshots.manifest import SnapshotRef, load_manifest
from torpor.snapshots.repack import Repacked, Repacker
from torpor.snapshots.store import SavedSnapshot, SnapshotStore

LENGTH = 1024
"""Pages of an image: four frames."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def room_in(directory: Path) -> layout.Room:
    @contextlib.contextmanager
    def room(_raw_bytes: int) -> Iterator[Path]:
        made = directory / "room"
        made.mkdir()
        yield made
        (made / "pages.img").unlink()
        made.rmdir()

    return room


def scattered(world: World) -> list[SnapshotRef]:
    """Eight saves, of which each changes a page in sixteen all over the image."""
    image = list(range(LENGTH))
    saved: list[SavedSnapshot] = []
    for step in range(8):
        image[step::16] = range(10_000 * (step + 1), 10_000 * (step + 1) + LENGTH // 16)
        (world.image / "pages.img").write_bytes(pages(image) + b"end")
        saved.append(world.save(str(step), saved[-1] if saved else None))
    return [one.ref for one in saved]


def lay_out(world: World, saved: list[SnapshotRef], room: layout.Room) -> list[Repacked]:
    repacker = Repacker(world.backend, IDS, grace_seconds=0, progress=lambda *_: None, room=room)
    repacker.look(saved, newest=[saved[-1].id])
    numbers = iter(range(100))
    with world.backend.leases.hold() as lease:
        return repacker.write(lambda: SnapshotId(f"snp_new{next(numbers)}"), lease)


def reads_of(world: World, work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> int:
    reads: list[str] = []
    real = world.backend.get_range
    with monkeypatch.context() as patched:
        patched.setattr(world.backend, "get_range", lambda key, *where: (reads.append(key), real(key, *where))[1])
        work()
    return len(reads)


def test_laid_out_image_is_the_same_and_its_restore_reads_no_more_than_a_first_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = scattered(world)
    [made] = lay_out(world, saved, room_in(tmp_path))
    assert made.old == saved[-1]
    store = SnapshotStore(world.backend, IDS)
    counts = [
        reads_of(world, lambda ref=ref, at=at: store.restore_image(ref, tmp_path / at), monkeypatch)
        for ref, at in ((saved[0], "first"), (saved[-1], "old"), (made.new, "new"))
    ]
    assert counts[1] > counts[0]
    assert counts[2] == counts[0]
    assert (tmp_path / "new/pages.img").read_bytes() == (tmp_path / "old/pages.img").read_bytes()
    laid_out = load_manifest(world.backend, made.new)
    assert not layout.is_scattered(laid_out)
    assert (laid_out.debt, any(laid_out.needs)) == (0, False)
    assert store.verify(made.new) == []
    assert lay_out(world, [*saved, made.new], room_in(tmp_path)) == []


def test_damaged_page_is_never_laid_out(world: World, tmp_path: Path) -> None:
    saved = scattered(world)
    [pack] = {ref.key for ref in load_manifest(world.backend, saved[0]).page_packs}
    path = next((world.store_directory / "packs").glob(f"*/{pack.removeprefix('packs/')}"))
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    manifests = world.backend.list("manifests/")
    with pytest.raises(Damaged):
        lay_out(world, saved, room_in(tmp_path))
    assert world.backend.list("manifests/") == manifests


def test_without_room_in_memory_an_image_stays_as_it_is(world: World, tmp_path: Path) -> None:
    @contextlib.contextmanager
    def full(_raw_bytes: int) -> Iterator[Path]:
        raise MachineUnfit("no_staging_space", "cannot stage an image")
        yield tmp_path

    saved = scattered(world)
    assert lay_out(world, saved, full) == []
