"""Names of one file stay names of one file, and of no other, over lives and disks with other inode numbers."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.snapshots.making import World, flat, settled

from torpor.snapshots.capture import capture
from torpor.snapshots.tree import DirNode, FileNode


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    for directory in ("a", "b"):
        (world.workspace / directory).mkdir()
    (world.workspace / "a" / "file").write_bytes(b"shared")
    os.link(world.workspace / "a" / "file", world.workspace / "b" / "file")
    return world


def test_links_stay_when_only_one_of_their_directories_changes_after_a_restore(world: World) -> None:
    """The other directory is used as it was written, in another life."""
    first = world.save("a")
    world.workspace = world.fresh("life")
    index = settled(world.store.restore_workspace(first.ref, world.workspace))
    (world.workspace / "a" / "another").write_bytes(b"x")
    captured = capture(world.workspace, world.fresh("staging"), index)
    assert captured.root.children[b"b"] is index.root.children[b"b"]
    restored = world.restored_workspace(world.save("b", first, index=index))
    assert (restored / "a" / "file").samefile(restored / "b" / "file")


def test_files_of_two_lives_are_never_taken_for_one(world: World) -> None:
    """A number that meant one inode in the first life means another in the second."""
    first = world.save("a")
    world.workspace = world.fresh("life")
    index = settled(world.store.restore_workspace(first.ref, world.workspace))
    old = index.root.children[b"b"]
    assert isinstance(old, DirNode)
    stored = old.children[b"file"]
    assert isinstance(stored, FileNode)
    for number in range(20):
        (world.workspace / "a" / f"new{number}").write_bytes(b"other bytes")
        os.link(world.workspace / "a" / f"new{number}", world.workspace / "a" / f"again{number}")
    second = world.save("b", first, index=index)
    a = second.tree.root.children[b"a"]
    assert isinstance(a, DirNode)
    groups = [node.link for name, node in a.children.items() if isinstance(node, FileNode) and name != b"file"]
    assert len(set(groups)) == 20
    assert stored.link not in groups
    assert not {node.stamp.inode for node in a.children.values()} & set(groups)
    restored = world.restored_workspace(second)
    assert flat(capture(restored, world.fresh("staging"))) == flat(capture(world.workspace, world.fresh("staging")))


def test_index_of_a_restore_spares_reading_linked_files(world: World) -> None:
    saved = world.save("a")
    target = world.fresh("restored")
    index = settled(world.store.restore_workspace(saved.ref, target))
    again = capture(target, world.fresh("staging"), index)
    assert again.root is index.root


def test_group_of_links_keeps_its_number_while_its_bytes_change(world: World) -> None:
    first = world.save("a")
    with (world.workspace / "a" / "file").open("ab") as file:
        file.write(b" and more")
    second = world.save("b", first, index=settled(first.tree))
    assert link_of(first.tree.root, b"b") == link_of(second.tree.root, b"a") == link_of(second.tree.root, b"b")


def test_file_that_lost_its_other_names_is_no_link(world: World) -> None:
    first = world.save("a")
    (world.workspace / "b" / "file").unlink()
    second = world.save("b", first, index=settled(first.tree))
    assert link_of(second.tree.root, b"a") == 0


def link_of(root: DirNode, directory: bytes) -> int:
    below = root.children[directory]
    assert isinstance(below, DirNode)
    node = below.children[b"file"]
    assert isinstance(node, FileNode)
    return node.link


def test_moved_directory_is_not_read_again(world: World) -> None:
    (world.workspace / "a" / "deep").mkdir()
    (world.workspace / "a" / "deep" / "file").write_bytes(os.urandom(1000))
    saved = world.save("a")
    (world.workspace / "a").rename(world.workspace / "moved")
    captured = capture(world.workspace, world.fresh("staging"), settled(saved.tree))
    assert captured.staged_bytes == 0
    moved = replace(captured, based_on=None)
    assert flat(moved) == flat(capture(world.workspace, world.fresh("staging")))
