"""Extended attributes: what a program noted is kept, what gives a right never comes back."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.snapshots.making import World, flat, settled

from torpor.core.errors import Damaged, SandboxFailed
from torpor.snapshots import attributes as attributes_module
from torpor.snapshots import scan as scan_module
from torpor.snapshots.attributes import decode_attributes, read_attributes, write_attributes
from torpor.snapshots.capture import capture


@pytest.fixture
def world(tmp_path: Path) -> World:
    try:
        os.setxattr(tmp_path, "user.probe", b"")
    except OSError:
        pytest.skip("the file system keeps no attributes")
    return World(tmp_path)


def attributes(path: Path) -> dict[bytes, bytes]:
    return {os.fsencode(name): os.getxattr(path, name) for name in os.listxattr(path)}


def test_attributes_of_files_and_directories_come_back(world: World) -> None:
    (world.workspace / "d").mkdir()
    (world.workspace / "d" / "file").write_bytes(b"x")
    (world.workspace / "d" / "closed").write_bytes(b"x")
    (world.workspace / "d" / "closed").chmod(0o400)
    os.setxattr(world.workspace / "d", "user.color", b"red\0\xff")
    os.setxattr(world.workspace / "d" / "file", "user.empty", b"")
    os.setxattr(world.workspace / "d" / "file", b"user.\xff\xfe", b"not UTF-8")
    os.setxattr(world.workspace / "d" / "closed", "user.note", b"y" * 1000)
    restored = world.restored_workspace(world.save("a"))
    for name in ("d", "d/file", "d/closed"):
        assert attributes(restored / name) == attributes(world.workspace / name) != {}


def test_change_of_an_attribute_alone_is_a_change(world: World) -> None:
    (world.workspace / "d").mkdir()
    (world.workspace / "file").write_bytes(b"x")
    saved = world.save("a")
    os.setxattr(world.workspace / "d", "user.one", b"1")
    os.setxattr(world.workspace / "file", "user.two", b"2")
    second = world.save("b", saved, index=settled(saved.tree))
    restored = world.restored_workspace(second)
    assert attributes(restored / "d") == {b"user.one": b"1"}
    assert attributes(restored / "file") == {b"user.two": b"2"}
    os.removexattr(world.workspace / "d", "user.one")
    os.removexattr(world.workspace / "file", "user.two")
    third = world.save("c", second, index=settled(second.tree))
    restored = world.restored_workspace(third)
    assert attributes(restored / "d") == attributes(restored / "file") == {}


def test_index_of_a_restore_knows_the_attributes(world: World) -> None:
    (world.workspace / "d").mkdir()
    os.setxattr(world.workspace / "d", "user.one", b"1")
    saved = world.save("a")
    target = world.fresh("restored")
    index = settled(world.store.restore_workspace(saved.ref, target))
    assert capture(target, world.fresh("staging"), index).root is index.root


def test_file_capabilities_are_left_out(world: World) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give a file capabilities")
    (world.workspace / "tool").write_bytes(b"#!/bin/sh\n")
    (world.workspace / "tool").chmod(0o4755)
    net_raw = (0x0200_0000).to_bytes(4, "little") + (1 << 13).to_bytes(4, "little") + bytes(12)
    os.setxattr(world.workspace / "tool", "security.capability", net_raw)
    os.setxattr(world.workspace / "tool", "trusted.mark", b"x")
    os.setxattr(world.workspace / "tool", "user.kept", b"x")
    restored = world.restored_workspace(world.save("a"))
    assert attributes(restored / "tool") == {b"user.kept": b"x"}


def test_no_encoded_name_leaves_the_user_namespace(world: World) -> None:
    """The prefix is added to whatever a tree says."""
    path = world.workspace / "file"
    path.write_bytes(b"x")
    with path.open("r+b") as file:
        write_attributes(file.fileno(), b"\x13security.capability" + (1).to_bytes(4, "little") + b"x")
    assert attributes(path) == {b"user.security.capability": b"x"}


@pytest.mark.parametrize(
    "encoded", [b"\x01", b"\x01a", b"\x01a\x05\0\0\0x", b"\0\0\0\0\0", b"\x02a\0\0\0\0\0", b"\x04a"], ids=repr
)
def test_attributes_that_are_cut_short_or_have_no_name_are_damaged(encoded: bytes) -> None:
    with pytest.raises(Damaged):
        list(decode_attributes(encoded))


NAMES = st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, st.binary(max_size=100), max_size=5))
def test_any_attributes_come_back(world: World, tmp_path_factory: pytest.TempPathFactory, expected) -> None:
    one, other = (tmp_path_factory.mktemp("attributes") / name for name in ("one", "other"))
    for path in (one, other):
        path.touch()
    for name, value in expected.items():
        os.setxattr(one, b"user." + name, value)
    with one.open("rb") as file, other.open("wb") as copy:
        encoded = read_attributes(file.fileno(), b"one")
        write_attributes(copy.fileno(), encoded)
    assert attributes(other) == attributes(one)


def test_too_many_bytes_of_attributes_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (world.workspace / name).touch()
        os.setxattr(world.workspace / name, "user.note", b"x" * 100)
    monkeypatch.setattr(scan_module, "ATTRIBUTES_BYTES_MAX", 150)
    with pytest.raises(SandboxFailed, match="extended attributes") as caught:
        capture(world.workspace, world.fresh("staging"))
    assert caught.value.code == "workspace_too_large"
    monkeypatch.setattr(attributes_module, "ATTRIBUTES_BYTES_MAX", 90)
    with pytest.raises(SandboxFailed, match="one"):
        capture(world.workspace, world.fresh("staging"))


def test_file_system_without_attributes_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = os.open("/proc/self", os.O_RDONLY)
    try:
        assert read_attributes(descriptor, b"x") == b""
    finally:
        os.close(descriptor)


def test_export_leaves_attributes_behind(world: World) -> None:
    (world.workspace / "file").write_bytes(b"x")
    os.setxattr(world.workspace / "file", "user.note", b"y")
    saved = world.save("a")
    target = world.fresh("pulled")
    world.store.export_workspace(saved.ref, target)
    assert attributes(target / "file") == {}
    assert flat(capture(world.workspace, world.fresh("staging")))[b"/file"] is not None
