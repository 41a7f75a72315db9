"""What `torpor diff` shows."""

import os
from pathlib import Path

import pytest
from tests.unit.snapshots.making import World

from torpor.snapshots.diff import Change


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    (world.workspace / "d").mkdir()
    (world.workspace / "d" / "file").write_bytes(b"before")
    (world.workspace / "gone" / "deep").mkdir(parents=True)
    (world.workspace / "gone" / "deep" / "file").write_bytes(b"x")
    (world.workspace / "link").symlink_to("here")
    (world.workspace / "mode").write_bytes(b"x")
    (world.workspace / "kind").write_bytes(b"x")
    (world.workspace / "same").write_bytes(b"x")
    return world


def change_everything(workspace: Path) -> None:
    (workspace / "d" / "file").write_bytes(b"behind")
    (workspace / "gone" / "deep" / "file").unlink()
    (workspace / "gone" / "deep").rmdir()
    (workspace / "gone").rmdir()
    (workspace / "link").unlink()
    (workspace / "link").symlink_to("there")
    (workspace / "mode").chmod(0o700)
    (workspace / "kind").unlink()
    (workspace / "kind").mkdir()
    (workspace / "kind" / "inner").write_bytes(b"x")
    os.utime(workspace / "same", ns=(7, 7))
    (workspace / "new").mkdir()
    (workspace / "new" / "file").write_bytes(b"x")


EXPECTED = [
    Change(b"d/file", "changed"),
    Change(b"gone", "removed"),
    Change(b"gone/deep", "removed"),
    Change(b"gone/deep/file", "removed"),
    Change(b"kind", "removed"),
    Change(b"kind", "added"),
    Change(b"kind/inner", "added"),
    Change(b"link", "changed"),
    Change(b"mode", "changed"),
    Change(b"new", "added"),
    Change(b"new/file", "added"),
]


def test_diff_of_two_snapshots_lists_each_change(world: World) -> None:
    before = world.save("a")
    change_everything(world.workspace)
    after = world.save("b", before)
    assert world.store.diff(before.ref, after.ref) == EXPECTED
    assert world.store.diff(after.ref, after.ref) == []


def test_diff_with_a_directory_lists_the_same(world: World) -> None:
    before = world.save("a")
    assert world.store.diff_directory(before.ref, world.workspace) == []
    change_everything(world.workspace)
    assert world.store.diff_directory(before.ref, world.workspace) == EXPECTED


def test_diff_backwards_swaps_added_and_removed(world: World) -> None:
    before = world.save("a")
    (world.workspace / "new").write_bytes(b"x")
    after = world.save("b", before)
    assert world.store.diff(before.ref, after.ref) == [Change(b"new", "added")]
    assert world.store.diff(after.ref, before.ref) == [Change(b"new", "removed")]


def test_diff_with_a_directory_enters_no_link(world: World) -> None:
    before = world.save("a")
    outside = world.fresh("outside")
    (outside / "file").write_bytes(b"x")
    (world.workspace / "way-out").symlink_to(outside)
    assert world.store.diff_directory(before.ref, world.workspace) == [Change(b"way-out", "added")]
