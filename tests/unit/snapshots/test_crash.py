"""`kill -9` at every crash point of a save, and full disks: earlier snapshots restore, nothing is half there."""

import itertools
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from tests.unit.snapshots.making import KEY, World, contents, page, pages, tiny_disk_at

from torpor.core import crash
from torpor.core.errors import MachineUnfit
from torpor.core.ids import SnapshotId
from torpor.snapshots.backend import LocalDirectory
from torpor.snapshots.capture import capture
from torpor.snapshots.manifest import SnapshotRef
from torpor.snapshots.store import SavedSnapshot

SAVE_CHILD = """
import sys
from collections.abc import Iterator
from pathlib import Path
from tests.unit.snapshots.making import IDS, KEY
from torpor.core.ids import SnapshotId
from torpor.snapshots.backend import LocalDirectory
from torpor.snapshots.capture import capture
from torpor.snapshots.manifest import SnapshotRef
from torpor.snapshots.store import SnapshotStore
root, parent_digest = Path(sys.argv[1]), sys.argv[2]
(root / "staging").mkdir(exist_ok=True)
store = SnapshotStore(LocalDirectory(root / "store"), IDS)
saved = store.save(
    image_dir=root / "image",
    workspace=capture(root / "workspace", root / "staging"),
    parent=SnapshotRef(id=SnapshotId("snp_parent"), manifest_digest=parent_digest, key=KEY),
    pins={},
    snapshot_id=SnapshotId("snp_child"),
    key=KEY,
    lease=store.lease(),
)
print(saved.manifest_digest)
"""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    with tiny_disk_at(tmp_path / "tiny") as disk:
        yield disk


@pytest.fixture
def parent(world: World) -> SavedSnapshot:
    """A snapshot, and after it a changed image and workspace that are not saved yet."""
    world.write_image(pages(range(50)))
    (world.workspace / "file").write_bytes(b"parent")
    parent = world.save("parent")
    world.write_image(pages(range(10, 60)))
    (world.workspace / "file").write_bytes(b"child")
    return parent


def save_in_child(world: World, parent: SavedSnapshot, crash_at: str | None) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "TORPOR_CRASH_POINT": crash_at} if crash_at else dict(os.environ)
    command = [sys.executable, "-c", SAVE_CHILD, str(world.root), parent.manifest_digest]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def check_objects_are_whole(world: World) -> None:
    """Everything that the store shows is complete, whether or not anything refers to it.

    Of packs that no manifest names nobody has the key: their heads and lengths are checked.
    """
    store = LocalDirectory(world.store_directory)
    assert list((world.store_directory / "partial").iterdir()) == []
    for name in store.list("packs/"):
        data = store.get(name)
        head = data[: 20 + int.from_bytes(data[8:12], "little")]
        assert name == f"packs/{sha256(head).hexdigest()}"
        assert len(data) == int.from_bytes(data[12:20], "little")


POINTS = [name for name in crash.CRASH_POINTS if name.startswith(("backend.", "snapshot."))]


@pytest.mark.parametrize("point", POINTS)
def test_kill_at_any_pass_of_a_crash_point_spares_what_was_saved(
    world: World, parent: SavedSnapshot, point: str
) -> None:
    for at_pass in itertools.count(1):
        world.backend.delete("manifests/snp_child")
        done = save_in_child(world, parent, f"{point}:{at_pass}")
        is_killed = done.returncode == -signal.SIGKILL
        assert is_killed or done.returncode == 0, done.stderr
        check_objects_are_whole(world)
        assert world.store.verify(parent.ref) == []
        assert contents(world.restored_workspace(parent)) == {"file": b"parent"}
        assert world.restored_image(parent)["pages.img"] == pages(range(50))
        if world.backend.exists("manifests/snp_child"):
            assert point in ("snapshot.manifest_written", "backend.linked") or not is_killed
        if not is_killed:
            assert at_pass > 1, "the crash point was never passed"
            child = SnapshotRef(id=SnapshotId("snp_child"), manifest_digest=done.stdout.strip(), key=KEY)
            world.store.restore_image(child, world.root / "restored-child")
            assert world.store.verify(child) == []
            assert contents(world.root / "restored-child") == contents(world.image)
            return


def test_every_crash_point_of_the_store_is_in_the_document() -> None:
    document = Path("docs/snapshot-format.md").read_text()
    assert [point for point in POINTS if f"`{point}`" not in document] == []


def test_unregistered_crash_point_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORPOR_CRASH_POINT", "snapshot.pack_written")
    with pytest.raises(ValueError, match="not registered"):
        crash.crash_point("snapshot.misspelt")


class TestNoSpace:
    def test_full_disk_at_any_write_leaves_earlier_snapshots_and_no_half_object(
        self, tmp_path: Path, tiny_disk: Path
    ) -> None:
        """The disk is filled to a different point for each save; the last one fits."""
        world = World(tmp_path, store=tiny_disk / "store")
        world.write_image(pages(range(50)))
        parent = world.save("parent")
        world.write_image(pages(range(40)) + pages(range(100, 120)), checkpoint=os.urandom(30_000))
        filler = tiny_disk / "filler"
        outcomes = []
        for free in (8_192, 40_000, 90_000, 110_000, 125_000, 200_000):
            filler.write_bytes(b"")
            status = os.statvfs(tiny_disk)
            filler.write_bytes(bytes(max(0, status.f_bavail * status.f_bsize - free)))
            before = set(world.backend.list(""))
            try:
                world.save(f"child{free}", parent)
                outcomes.append("saved")
            except MachineUnfit as error:
                outcomes.append(error.code)
                assert "manifests/" not in "".join(set(world.backend.list("")) - before)
            filler.write_bytes(b"")
            check_objects_are_whole(world)
            assert world.store.verify(parent.ref) == []
            for key in set(world.backend.list("")) - before:
                world.backend.delete(key)
        assert outcomes[0] == "no_space"
        assert outcomes[-1] == "saved"
        assert set(outcomes) == {"no_space", "saved"}

    def test_staging_without_space_is_no_space(self, world: World, tiny_disk: Path) -> None:
        (world.workspace / "big").write_bytes(os.urandom(5_000_000))
        with pytest.raises(MachineUnfit) as caught:
            capture(world.workspace, tiny_disk)
        assert caught.value.code == "no_space"

    def test_restore_without_space_is_no_space(self, world: World, tiny_disk: Path) -> None:
        world.write_image(pages(range(1000)))
        (world.workspace / "big").write_bytes(os.urandom(5_000_000))
        saved = world.save("a")
        for restore in (world.store.restore_image, world.store.restore_workspace):
            target = tiny_disk / restore.__name__
            target.mkdir()
            with pytest.raises(MachineUnfit) as caught:
                restore(saved.ref, target)
            assert caught.value.code == "no_space"

    def test_file_size_limit_is_no_space_and_publishes_nothing(self, world: World, parent: SavedSnapshot) -> None:
        """What runs as an ordinary user too: RLIMIT_FSIZE in a process of its own."""
        world.write_image(pages(range(200)))
        program = f"""
import resource
from torpor.core.errors import MachineUnfit
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    exec({SAVE_CHILD!r})
except MachineUnfit as error:
    print(error.code)
"""
        done = subprocess.run(
            [sys.executable, "-c", program, str(world.root), parent.manifest_digest],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "no_space\n"
        assert not world.backend.exists("manifests/snp_child")
        check_objects_are_whole(world)
        assert world.store.verify(parent.ref) == []


def test_a_thousand_operations_leak_no_descriptor_and_no_thread(world: World) -> None:
    """The limit is set so low that a leak of one descriptor per operation ends the test."""
    world.write_image(pages(range(20)) + page(1)[:5])
    (world.workspace / "d").mkdir()
    (world.workspace / "d" / "file").write_bytes(b"x" * 200_000)
    saved = world.save("a")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 16, hard))
    try:
        for _ in range(40):
            world.restored_image(saved)
            world.restored_workspace(saved)
            world.store.verify(saved.ref)
            capture(world.workspace, world.fresh("staging"))
            world.new_store()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
