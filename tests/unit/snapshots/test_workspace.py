"""A workspace captured, stored and given back; what counts as unchanged; what a hostile one can't do."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.snapshots.making import KEY, StillClock, World, settled, tiny_disk_at, with_stamps_of

from torpor.core.errors import Damaged, InvalidInput, SandboxFailed
from torpor.snapshots import aside as aside_module
from torpor.snapshots import scan as scan_module
from torpor.snapshots.capture import TreeCapture, capture
from torpor.snapshots.objects import CHUNK_BYTES_MAX
from torpor.snapshots.scan import StagedDir, StagedFile
from torpor.snapshots.store import SavedSnapshot
from torpor.snapshots.tree import DEPTH_MAX, DirNode, FileNode, decode_directory


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def listing(directory: Path) -> dict[bytes, tuple[object, ...]]:
    """Everything that must survive: kind, mode, mtime, bytes or target, and which names are one file."""
    seen: dict[bytes, tuple[object, ...]] = {}
    groups: dict[int, int] = {}
    root = os.fsencode(directory)
    for where, directories, files in os.walk(root):
        for name in sorted(directories + files):
            path = os.path.join(where, name)
            status = os.lstat(path)
            body: object = None
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    body = file.read()
            elif stat.S_ISLNK(status.st_mode):
                body = os.readlink(path)
            group = groups.setdefault(status.st_ino, len(groups)) if status.st_nlink > 1 and body is not None else None
            seen[os.path.relpath(path, root)] = (status.st_mode, status.st_mtime_ns, body, group)
    return seen


def staged_names(tree: TreeCapture) -> set[bytes]:
    """Paths of the files whose bytes a capture took."""

    def below(node: object, path: bytes) -> Iterator[bytes]:
        if isinstance(node, StagedFile):
            yield path
        elif isinstance(node, StagedDir):
            for name, child in node.children.items():
                yield from below(child, path + b"/" + name if path else name)

    return set(below(tree.root, b""))


class TestRoundTrip:
    def check(self, world: World) -> SavedSnapshot:
        saved = world.save("a")
        assert listing(world.restored_workspace(saved)) == listing(world.workspace)
        assert world.store.diff_directory(saved.ref, world.workspace) == []
        return saved

    def test_files_of_all_sizes(self, world: World) -> None:
        for size in (0, 1, CHUNK_BYTES_MAX - 1, CHUNK_BYTES_MAX, CHUNK_BYTES_MAX + 1, 3 * CHUNK_BYTES_MAX + 7):
            (world.workspace / f"random{size}").write_bytes(os.urandom(size))
            (world.workspace / f"zeros{size}").write_bytes(bytes(size))
        self.check(world)

    def test_modes_times_and_empty_directories(self, world: World) -> None:
        (world.workspace / "empty" / "deeper").mkdir(parents=True)
        for mode in (0o755, 0o640, 0o600, 0o400):
            path = world.workspace / f"file{mode:o}"
            path.write_bytes(b"x")
            path.chmod(mode)
            os.utime(path, ns=(1, 1_234_567_890_123_456_789 + mode))
        os.utime(world.workspace / "empty" / "deeper", ns=(5, 5))
        os.utime(world.workspace / "empty", ns=(-7, -7))
        self.check(world)

    def test_names_that_are_not_utf8_or_look_odd(self, world: World) -> None:
        root = os.fsencode(world.workspace)
        for name in (b"\xff\xfe", b"new\nline", b"-rf", b" ", b"..x", b"\\", "ünï".encode(), b"a" * 255):
            with open(root + b"/" + name, "wb") as file:
                file.write(name)
        self.check(world)

    def test_symbolic_links_are_kept_as_they_are(self, world: World) -> None:
        targets = ["/etc/passwd", "../../..", "nowhere", "loop", "x/" * 500, "\udcff"]
        for number, target in enumerate(targets):
            (world.workspace / f"link{number}").symlink_to(target)
        (world.workspace / "loop").symlink_to("loop")
        self.check(world)

    def test_hard_links_stay_one_file(self, world: World) -> None:
        (world.workspace / "sub").mkdir()
        (world.workspace / "one").write_bytes(b"shared")
        os.link(world.workspace / "one", world.workspace / "two")
        os.link(world.workspace / "one", world.workspace / "sub" / "three")
        (world.workspace / "big").write_bytes(os.urandom(500_000))
        os.link(world.workspace / "big", world.workspace / "sub" / "big")
        saved = self.check(world)
        restored = world.restored_workspace(saved)
        assert (restored / "one").samefile(restored / "sub" / "three")

    def test_file_linked_from_outside_of_the_workspace_is_a_file_of_its_own(self, world: World) -> None:
        (world.workspace / "inside").write_bytes(b"x")
        os.link(world.workspace / "inside", world.root / "outside")
        restored = world.restored_workspace(world.save("a"))
        assert (restored / "inside").stat().st_nlink == 1

    def test_owners_are_kept_relative_to_the_workspace(self, world: World) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root, to give files away")
        os.chown(world.workspace, 1000, 1000)
        for name, uid in (("mine", 1000), ("other", 2000)):
            (world.workspace / name).write_bytes(b"x")
            os.chown(world.workspace / name, uid, uid)
        restored = world.restored_workspace(world.save("a"))
        assert ((restored / "mine").stat().st_uid, (restored / "other").stat().st_gid) == (0, 2000)


CLOSED = """
import os, stat, sys
from pathlib import Path
from tests.unit.snapshots.making import World
if os.geteuid() == 0:
    os.chown(sys.argv[1], 65534, 65534)
    os.setresuid(65534, 65534, 65534)
world = World(Path(sys.argv[1]))
closed = world.workspace / "closed"
closed.mkdir()
(closed / "file").write_bytes(b"x")
(closed / "file").chmod(0)
closed.chmod(0)
restored = world.restored_workspace(world.save("a"))
for directory in (world.workspace, restored):
    assert stat.S_IMODE((directory / "closed").stat().st_mode) == 0
    (directory / "closed").chmod(0o700)
    assert stat.S_IMODE((directory / "closed" / "file").stat().st_mode) == 0
    (directory / "closed" / "file").chmod(0o600)
    assert (directory / "closed" / "file").read_bytes() == b"x"
print("ok")
"""


def test_files_that_their_owner_closed_to_itself_are_captured_all_the_same() -> None:
    """Root would not notice, so the program becomes an ordinary user first."""
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run([sys.executable, "-c", CLOSED, directory], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr


NAMES = st.binary(min_size=1, max_size=6).filter(lambda name: name not in (b".", b"..") and not set(name) & set(b"/\0"))
FILES = st.tuples(st.just("file"), st.binary(max_size=40), st.integers(0o400, 0o777), st.integers(0, 2**60))
LINKS = st.tuples(
    st.just("link"), st.binary(min_size=1, max_size=30).filter(lambda target: b"\0" not in target), st.none(), st.none()
)
TREES = st.recursive(
    st.dictionaries(NAMES, FILES | LINKS, max_size=4),
    lambda below: st.dictionaries(NAMES, FILES | LINKS | below, max_size=4),
    max_leaves=12,
)


def build(directory: bytes, tree: dict[bytes, object]) -> None:
    for name, node in tree.items():
        path = directory + b"/" + name
        if isinstance(node, dict):
            os.mkdir(path)
            build(path, node)
            continue
        assert isinstance(node, tuple)
        kind, body, mode, mtime_ns = node
        if kind == "link":
            os.symlink(body, path)
            continue
        with open(path, "wb") as file:
            file.write(body)
        os.chmod(path, mode)
        os.utime(path, ns=(mtime_ns, mtime_ns))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TREES, TREES)
def test_any_tree_comes_back_after_any_other(tmp_path_factory: pytest.TempPathFactory, one, other) -> None:
    """Saved as first snapshot, then as the child of a different one, through an index that a restore gave."""
    world = World(tmp_path_factory.mktemp("trees"))
    build(os.fsencode(world.workspace), one)
    first = world.save("a")
    assert listing(world.restored_workspace(first)) == listing(world.workspace)
    world.workspace = world.fresh("restored")
    index = world.store.restore_workspace(first.ref, world.workspace)
    for name in os.listdir(os.fsencode(world.workspace)):
        if name in other:
            os.rename(os.fsencode(world.workspace) + b"/" + name, os.fsencode(world.root) + b"/aside")
            os.rename(os.fsencode(world.root) + b"/aside", os.fsencode(world.workspace) + b"/" + name + b"-moved")
    build(os.fsencode(world.workspace), dict(other.items()))
    second = world.save("b", first, index=index)
    assert listing(world.restored_workspace(second)) == listing(world.workspace)
    assert world.store.verify(second.ref) == []
    changes = world.store.diff(first.ref, second.ref)
    assert changes == world.store.diff_directory(first.ref, world.workspace)


def test_times_beyond_64_bits_of_nanoseconds_are_kept_as_near_as_possible(world: World, tmp_path: Path) -> None:
    with tiny_disk_at(tmp_path / "tiny") as workspace:
        (workspace / "future").write_bytes(b"x")
        os.utime(workspace / "future", ns=(0, 2**64))
        assert (workspace / "future").stat().st_mtime_ns > 2**63
        world.workspace = workspace
        saved = world.save("a")
        assert (world.restored_workspace(saved) / "future").stat().st_mtime > 2**32


class TestSparse:
    def test_sparse_file_is_neither_stored_nor_restored_full(self, world: World) -> None:
        path = world.workspace / "sparse"
        with path.open("wb") as file:
            file.truncate(1 << 40)
            for at in (0, 123_456_789, (1 << 40) - 1):
                file.seek(at)
                file.write(b"x")
        saved = world.save("a")
        assert saved.stored_bytes < 10_000
        restored = world.restored_workspace(saved) / "sparse"
        assert restored.stat().st_size == 1 << 40
        assert restored.stat().st_blocks * 512 <= 5 * 4096
        with restored.open("rb") as file:
            file.seek(123_456_788)
            assert file.read(3) == b"\0x\0"

    def test_staging_copies_no_holes(self, world: World) -> None:
        with (world.workspace / "sparse").open("wb") as file:
            file.truncate(1 << 34)
            file.seek(1 << 33)
            file.write(b"x")
        staging = world.fresh("staging")
        capture(world.workspace, staging)
        assert sum(path.stat().st_blocks * 512 for path in staging.iterdir()) <= 1 << 20

    def test_many_small_islands_do_not_grow_by_being_restored(self, world: World) -> None:
        with (world.workspace / "islands").open("wb") as file:
            for at in range(50):
                file.seek(at * CHUNK_BYTES_MAX)
                file.write(b"x" * 4096)
        restored = world.restored_workspace(world.save("a")) / "islands"
        assert restored.stat().st_blocks * 512 <= 60 * 4096
        assert restored.read_bytes() == (world.workspace / "islands").read_bytes()

    def test_content_does_not_depend_on_where_the_holes_are(self, world: World) -> None:
        with (world.workspace / "holes").open("wb") as file:
            file.truncate(CHUNK_BYTES_MAX * 2 + 5)
        (world.workspace / "written").write_bytes(bytes(CHUNK_BYTES_MAX * 2 + 5))
        root = world.save("a").tree.root
        assert isinstance(root.children[b"holes"], FileNode)
        assert isinstance(root.children[b"written"], FileNode)
        assert root.children[b"holes"].content == root.children[b"written"].content


class TestUnchanged:
    def capture(self, world: World, saved: SavedSnapshot | None, **options: object) -> TreeCapture:
        index = saved and settled(saved.tree)
        return capture(world.workspace, world.fresh("staging"), index, **options)  # type: ignore[arg-type]

    def test_untouched_workspace_is_taken_whole_from_the_index(self, world: World) -> None:
        (world.workspace / "a" / "b").mkdir(parents=True)
        (world.workspace / "a" / "b" / "file").write_bytes(b"x")
        saved = world.save("a")
        again = self.capture(world, saved)
        assert isinstance(again.root, DirNode)
        assert again.root is saved.tree.root
        assert again.staged_bytes == 0

    def test_only_what_changed_is_read_and_other_directories_are_shared(self, world: World) -> None:
        for name in ("left", "right"):
            (world.workspace / name).mkdir()
            (world.workspace / name / "file").write_bytes(b"x")
            (world.workspace / name / "still").write_bytes(b"x")
        saved = world.save("a")
        (world.workspace / "left" / "file").write_bytes(b"y")
        again = self.capture(world, saved)
        assert staged_names(again) == {b"left/file"}
        assert isinstance(again.root, StagedDir)
        assert again.root.children[b"right"] is saved.tree.root.children[b"right"]

    def test_same_size_and_restored_mtime_do_not_hide_a_change(self, world: World) -> None:
        path = world.workspace / "file"
        path.write_bytes(b"before")
        saved = world.save("a")
        status = path.stat()
        path.write_bytes(b"behind")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert staged_names(self.capture(world, saved)) == {b"file"}

    @pytest.mark.parametrize(("age_ms", "is_read"), [(-5, True), (0, True), (19, True), (21, False)])
    def test_file_that_changed_within_20_ms_of_the_previous_cut_is_read_again(
        self, world: World, age_ms: int, is_read: bool
    ) -> None:
        path = world.workspace / "file"
        path.write_bytes(b"x")
        changed_ns = path.stat().st_ctime_ns
        clock = StillClock(changed_ns + age_ms * 1_000_000)
        first = world.store.save(
            image_dir=world.image,
            workspace=capture(world.workspace, world.fresh("staging"), clock=clock),
            parent=None,
            pins={},
            snapshot_id="snp_a",  # type: ignore[arg-type]
            key=KEY,
            lease=world.store.lease(),
        )
        again = capture(world.workspace, world.fresh("staging"), first.tree)
        assert staged_names(again) == ({b"file"} if is_read else set())

    def test_store_through_mmap_is_only_seen_if_the_file_is_named(self, world: World) -> None:
        """Such a store moves neither size nor times; the sandbox knows which files it holds open for writing."""
        (world.workspace / "d").mkdir()
        path = world.workspace / "d" / "database"
        path.write_bytes(b"before")
        saved = world.save("a")
        path.write_bytes(b"behind")
        index = with_stamps_of(settled(saved.tree), world.workspace)
        blind = capture(world.workspace, world.fresh("staging"), index)
        assert staged_names(blind) == set()
        mapped = {path.stat().st_ino}
        named = capture(world.workspace, world.fresh("staging"), index, always_reread=mapped)
        assert staged_names(named) == {b"d/database"}

    def test_replaced_kind_is_noticed(self, world: World) -> None:
        (world.workspace / "was-file").write_bytes(b"x")
        (world.workspace / "was-link").symlink_to("x")
        (world.workspace / "was-directory").mkdir()
        saved = world.save("a")
        for name in ("was-file", "was-link"):
            (world.workspace / name).unlink()
        (world.workspace / "was-directory").rmdir()
        (world.workspace / "was-file").mkdir()
        (world.workspace / "was-link").write_bytes(b"y")
        (world.workspace / "was-directory").symlink_to("z")
        second = world.save("b", saved, index=settled(saved.tree))
        assert listing(world.restored_workspace(second)) == listing(world.workspace)

    def test_chmod_touch_rename_and_removal_are_noticed(self, world: World) -> None:
        for name in ("mode", "time", "old", "gone"):
            (world.workspace / name).write_bytes(name.encode())
        saved = world.save("a")
        (world.workspace / "mode").chmod(0o755)
        os.utime(world.workspace / "time", ns=(9, 9))
        (world.workspace / "old").rename(world.workspace / "new")
        (world.workspace / "gone").unlink()
        second = world.save("b", saved, index=settled(saved.tree))
        assert listing(world.restored_workspace(second)) == listing(world.workspace)

    @pytest.mark.parametrize("where", [".", "d"])
    def test_removal_alone_is_noticed(self, world: World, where: str) -> None:
        (world.workspace / "d").mkdir()
        for directory in (".", "d"):
            for name in ("stays", "goes"):
                (world.workspace / directory / name).write_bytes(b"x")
        saved = world.save("a")
        (world.workspace / where / "goes").unlink()
        second = world.save("b", saved, index=settled(saved.tree))
        assert listing(world.restored_workspace(second)) == listing(world.workspace)

    def test_index_of_a_restore_spares_reading_what_was_restored(self, world: World) -> None:
        (world.workspace / "d").mkdir()
        (world.workspace / "d" / "file").write_bytes(os.urandom(300_000))
        (world.workspace / "link").symlink_to("d")
        saved = world.save("a")
        target = world.fresh("restored")
        index = world.store.restore_workspace(saved.ref, target)
        again = capture(target, world.fresh("staging"), settled(index))
        assert again.root is index.root
        assert index.root.digest == saved.tree.root.digest

    def test_what_is_left_out_is_absent_with_everything_below(self, world: World) -> None:
        for name in ("keep", "secret", "d/keep", "d/secret/below"):
            path = world.workspace / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        asked: list[bytes] = []
        captured = self.capture(world, None, leave_out=lambda path: asked.append(path) or path.endswith(b"secret"))
        assert staged_names(captured) == {b"keep", b"d/keep"}
        assert sorted(asked) == [b"d", b"d/keep", b"d/secret", b"keep", b"secret"]

    def test_big_changed_file_is_staged_as_it_was_at_the_cut(self, world: World) -> None:
        path = world.workspace / "big"
        at_the_cut = os.urandom(1_000_000)
        path.write_bytes(at_the_cut)
        staged = capture(world.workspace, world.fresh("staging"))
        path.write_bytes(b"the agent runs on")
        saved = world.store.save(
            image_dir=world.image,
            workspace=staged,
            parent=None,
            pins={},
            snapshot_id="snp_a",  # type: ignore[arg-type]
            key=KEY,
            lease=world.store.lease(),
        )
        assert (world.restored_workspace(saved) / "big").read_bytes() == at_the_cut

    def test_memory_for_small_files_is_bounded(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(aside_module, "_IN_MEMORY_BYTES_MAX", 2500)
        for number in range(5):
            (world.workspace / f"file{number}").write_bytes(os.urandom(1000))
        staging = world.fresh("staging")
        capture(world.workspace, staging)
        assert len(list(staging.iterdir())) == 3


class TestHostile:
    def test_devices_sockets_and_fifos_are_left_out_and_listed(self, world: World) -> None:
        os.mkfifo(world.workspace / "fifo")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(world.workspace / "socket"))
        expected = {b"fifo", b"socket"}
        if os.geteuid() == 0:
            os.mknod(world.workspace / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
            expected.add(b"null")
        captured = capture(world.workspace, world.fresh("staging"))
        assert set(captured.skipped) == expected
        saved = world.save("a")
        assert list(world.restored_workspace(saved).iterdir()) == []
        assert world.store.diff_directory(saved.ref, world.workspace) == []

    def test_capture_never_reads_through_a_link(self, world: World) -> None:
        secret = world.root / "secret"
        secret.mkdir()
        (secret / "key").write_bytes(b"do not copy")
        (world.workspace / "to-directory").symlink_to(secret)
        (world.workspace / "to-file").symlink_to(secret / "key")
        saved = world.save("a")
        assert all(b"do not copy" not in path.read_bytes() for path in world.object_paths())
        assert (world.restored_workspace(saved) / "to-file").is_symlink()

    def test_setuid_and_setgid_never_come_back(self, world: World) -> None:
        path = world.workspace / "tool"
        path.write_bytes(b"#!/bin/sh\n")
        path.chmod(0o6755)
        (world.workspace / "d").mkdir()
        (world.workspace / "d").chmod(0o3777)
        saved = world.save("a")
        restored = world.restored_workspace(saved)
        assert stat.S_IMODE((restored / "tool").stat().st_mode) == 0o755
        assert stat.S_IMODE((restored / "d").stat().st_mode) == 0o1777

    def test_too_deep_a_tree_is_refused_without_running_out_of_anything(self, world: World) -> None:
        descriptor = os.open(world.workspace, os.O_RDONLY)
        for _ in range(DEPTH_MAX + 2):
            os.mkdir("d", dir_fd=descriptor)
            deeper = os.open("d", os.O_RDONLY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = deeper
        os.close(descriptor)
        with pytest.raises(SandboxFailed) as caught:
            capture(world.workspace, world.fresh("staging"))
        assert caught.value.code == "workspace_too_deep"

    def test_deepest_tree_allowed_comes_back(self, world: World) -> None:
        path = world.workspace.joinpath(*["d"] * DEPTH_MAX)
        path.mkdir(parents=True)
        (path / "file").write_bytes(b"x")
        restored = world.restored_workspace(world.save("a"))
        assert (restored.joinpath(*["d"] * DEPTH_MAX) / "file").read_bytes() == b"x"

    def test_too_many_files_are_refused(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scan_module, "ENTRIES_MAX", 10)
        for number in range(11):
            (world.workspace / str(number)).touch()
        with pytest.raises(SandboxFailed) as caught:
            capture(world.workspace, world.fresh("staging"))
        assert caught.value.code == "workspace_too_large"

    @pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/etc", b"a\0b"])
    def test_directory_object_with_a_name_that_leads_out_is_damaged(self, name: bytes) -> None:
        entry = b"l\xff\x01" + bytes(16) + len(name).to_bytes(2, "little") + bytes(4) + name + b"\x01\x00x"
        with pytest.raises(Damaged, match="not allowed"):
            decode_directory(entry)

    def test_links_planted_before_a_restore_are_not_written_through(self, world: World) -> None:
        (world.workspace / "d").mkdir()
        (world.workspace / "d" / "file").write_bytes(b"x")
        saved = world.save("a")
        outside, target = world.fresh("outside"), world.fresh("target")
        (target / "d").symlink_to(outside)
        with pytest.raises(InvalidInput):
            world.store.restore_workspace(saved.ref, target)
        assert list(outside.iterdir()) == []
