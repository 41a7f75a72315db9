"""Big changed files are cloned where the file system can, on real ones: XFS, Btrfs, and ext4, which can't."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.snapshots.making import KEY, World

from torpor.core.ids import SnapshotId
from torpor.snapshots.capture import capture

MAKERS = {"xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"], "ext4": ["mkfs.ext4", "-q"]}
BIG = 5 * 1024 * 1024


@pytest.fixture(params=list(MAKERS))
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A small disk of its own with such a file system."""
    kind = request.param
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a file system")
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    with image.open("wb") as file:
        file.truncate(320 * 1024 * 1024)
    try:
        subprocess.run([*MAKERS[kind], str(image)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip(f"no {MAKERS[kind][0]} here")
    mounted.mkdir()
    done = subprocess.run(
        ["mount", "-o", "loop", str(image), str(mounted)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount {kind}: {done.stderr.strip()}")
    yield kind, mounted
    subprocess.run(["umount", str(mounted)], check=True)


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_big_file_is_cloned_where_that_is_possible_and_copied_elsewhere(disk: tuple[str, Path], tmp_path: Path) -> None:
    kind, mounted = disk
    world = World(made(tmp_path / "world"))
    world.workspace = mounted / "workspace"
    world.workspace.mkdir()
    at_the_cut = os.urandom(BIG)
    (world.workspace / "big").write_bytes(at_the_cut)
    (world.workspace / "small").write_bytes(b"x")
    clones, staging = mounted / "clones", world.fresh("staging")
    captured = capture(world.workspace, staging, clones=clones)
    (world.workspace / "big").write_bytes(b"the agent runs on")
    if kind == "ext4":
        assert (captured.staged_bytes, captured.cloned_bytes) == (BIG + 1, 0)
        assert not clones.exists()
    else:
        assert (captured.staged_bytes, captured.cloned_bytes) == (1, BIG)
        assert list(staging.iterdir()) == []
    with world.store.lease() as lease:
        saved = world.store.save(
            image_dir=world.image,
            workspace=captured,
            parent=None,
            pins={},
            snapshot_id=SnapshotId("snp_a"),
            key=KEY,
            lease=lease,
        )
    assert (world.restored_workspace(saved) / "big").read_bytes() == at_the_cut
