"""What a watch heard stands for a look at every file: whatever happens, a watched capture finds what a full one
finds.
"""

import ctypes
import mmap
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.unit.snapshots.making import HashingWriter, StillClock, World, flat, settled, time_stamps_move

from torpor.core.clock import SystemClock
from torpor.core.ids import SnapshotId
from torpor.snapshots.capture import TreeCapture, capture, store_tree, watch_tree
from torpor.snapshots.scan import Scan
from torpor.snapshots.tree import TreeIndex
from torpor.snapshots.watch import DirectoryWatch, open_watch

MEMORY = Path("/dev/shm")
RENAME_EXCHANGE = 2


class Watched:
    """A workspace that is watched, with cuts that lie in the future: no file counts as fresh, so that nothing
    is looked at but for what was heard.
    """

    def __init__(self, root: Path) -> None:
        self.world = World(root)
        self.workspace = self.world.workspace
        self.watch = DirectoryWatch()
        self.clock = StillClock(SystemClock().wall_ns() + 3_600_000_000_000)
        self.index: TreeIndex | None = None
        self.listed: set[bytes] = set()
        self.held: list[int] = []

    def cut(self, *, always_reread: frozenset[int] | None = frozenset(), committed: bool = True) -> TreeCapture:
        time_stamps_move(self.world.root)
        captured = capture(
            self.workspace,
            self.world.fresh("staging"),
            self.index,
            always_reread=always_reread,
            watch=self.watch,
            clock=self.clock,
        )
        if committed:
            root = store_tree(captured, HashingWriter())  # type: ignore[arg-type]
            self.index = captured.index(root, SnapshotId("snp_x"))
        return captured

    def everything(self) -> dict[bytes, object]:
        return flat(capture(self.workspace, self.world.fresh("staging")))

    def at(self, path: str) -> Path:
        return self.workspace / path


@pytest.fixture(params=["disk", "memory"])
def watched(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """On the disk's file system, and on one where a store through a mapping moves no time stamp."""
    root = tmp_path
    if request.param == "memory":
        if not os.access(MEMORY, os.W_OK):
            pytest.skip("no memory-backed directory")
        root = MEMORY / f"torpor-test-{os.getpid()}-{id(tmp_path)}"
        root.mkdir(mode=0o700)
    watched = Watched(root)
    listed = Scan._listed

    def listing(scan: Scan, place: object, *, everything: bool = False) -> object:
        if scan._watch:
            watched.listed.add(place.path)  # type: ignore[attr-defined]
        return listed(scan, place, everything=everything)  # type: ignore[arg-type]

    for name in ("a", "a/b", "a/b/c", "quiet", "quiet/below", "empty"):
        watched.at(name).mkdir()
    for name in ("one", "a/two", "a/b/three", "a/b/c/four", "quiet/five", "quiet/below/six"):
        watched.at(name).write_bytes(name.encode() * 100)
    watched.at("a/link").symlink_to("two")
    for name in ("a/two", "a/b"):
        try:
            os.setxattr(watched.at(name), "user.before", b"x")
        except OSError:
            pytest.skip("the file system keeps no attributes")
    watched.cut()
    monkeypatch.setattr(Scan, "_listed", listing)
    yield watched
    for descriptor in watched.held:
        os.close(descriptor)
    watched.watch.close()
    if request.param == "memory":
        shutil.rmtree(root)


@dataclass(frozen=True)
class Change:
    name: str
    make: Callable[[Watched], object]
    listed: set[bytes] | None
    """The directories that the capture after it lists; None: more than the change's own."""


def change(*listed: str, everything: bool = False) -> Callable[[Callable[[Watched], object]], None]:
    def note(make: Callable[[Watched], object]) -> None:
        seen = None if everything else {path.encode() for path in listed}
        CHANGES.append(Change(make.__name__, make, seen))

    return note


CHANGES: list[Change] = []


@change()
def nothing(w: Watched) -> None:
    pass


@change("a/b/")
def write(w: Watched) -> None:
    with w.at("a/b/three").open("r+b") as file:
        file.write(b"XX")


@change("a/b/")
def write_and_the_times_put_back(w: Watched) -> None:
    status = w.at("a/b/three").stat()
    with w.at("a/b/three").open("r+b") as file:
        file.write(b"XX")
    os.utime(w.at("a/b/three"), ns=(status.st_atime_ns, status.st_mtime_ns))


@change("a/b/c/")
def truncation(w: Watched) -> None:
    os.truncate(w.at("a/b/c/four"), 7)


@change("a/")
def truncation_on_opening(w: Watched) -> None:
    os.close(os.open(w.at("a/two"), os.O_WRONLY | os.O_TRUNC))


@change("")
def hole(w: Watched) -> None:
    with w.at("one").open("r+b") as file:
        keep_size_punch_hole = 3
        assert (
            ctypes.CDLL(None).fallocate(file.fileno(), keep_size_punch_hole, ctypes.c_long(0), ctypes.c_long(100)) == 0
        )


@change("")
def copy_in_the_kernel(w: Watched) -> None:
    with w.at("quiet/five").open("rb") as source, w.at("one").open("r+b") as target:
        os.copy_file_range(source.fileno(), target.fileno(), 50)


@change("a/b/")
def mode(w: Watched) -> None:
    w.at("a/b/three").chmod(0o751)


@change("a/", "a/b/")
def mode_of_a_directory(w: Watched) -> None:
    w.at("a/b").chmod(0o711)


@change("a/")
def owner(w: Watched) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give files away")
    os.chown(w.at("a/two"), 7, 8)


@change("a/")
def owner_of_a_link(w: Watched) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give files away")
    os.lchown(w.at("a/link"), 7, 8)


@change("a/")
def times(w: Watched) -> None:
    os.utime(w.at("a/two"), ns=(5, 123_456_789))


@change("a/")
def times_through_a_descriptor_for_reading(w: Watched) -> None:
    with w.at("a/two").open("rb") as file:
        os.utime(file.fileno(), ns=(5, 123_456_789))


@change("a/")
def times_of_a_link(w: Watched) -> None:
    os.utime(w.at("a/link"), ns=(5, 6), follow_symlinks=False)


@change("", "empty/")
def times_of_a_directory(w: Watched) -> None:
    os.utime(w.at("empty"), ns=(5, 6))


@change("quiet/")
def new_attribute(w: Watched) -> None:
    os.setxattr(w.at("quiet/five"), "user.new", b"y")


@change("a/")
def other_value_of_an_attribute(w: Watched) -> None:
    os.setxattr(w.at("a/two"), "user.before", b"z")


@change("a/")
def attribute_removed(w: Watched) -> None:
    os.removexattr(w.at("a/two"), "user.before")


@change("a/", "a/b/")
def attribute_of_a_directory(w: Watched) -> None:
    os.setxattr(w.at("a/b"), "user.before", b"z")


@change("a/")
def new_file(w: Watched) -> None:
    w.at("a/new").write_bytes(b"new")


@change("a/")
def new_link(w: Watched) -> None:
    w.at("a/new").symlink_to("anywhere")


@change("a/")
def fifo(w: Watched) -> None:
    os.mkfifo(w.at("a/fifo"))


@change("a/", "a/new/", "a/new/deeper/")
def new_directories(w: Watched) -> None:
    w.at("a/new/deeper").mkdir(parents=True)
    w.at("a/new/deeper/file").write_bytes(b"x")


@change("a/b/")
def file_removed(w: Watched) -> None:
    w.at("a/b/three").unlink()


@change("")
def empty_directory_removed(w: Watched) -> None:
    w.at("empty").rmdir()


@change("a/")
def whole_directory_removed(w: Watched) -> None:
    shutil.rmtree(w.at("a/b"))


@change("a/", "a/b/", "a/b/c/", "a/b/c/d/")
def directory_removed_and_made_again(w: Watched) -> None:
    """Perhaps with the inode number that it had."""
    shutil.rmtree(w.at("a/b"))
    w.at("a/b/c/d").mkdir(parents=True)
    w.at("a/b/c/four").write_bytes(b"another four")


@change("a/b/")
def renamed(w: Watched) -> None:
    w.at("a/b/three").rename(w.at("a/b/3"))


@change("a/b/", "quiet/")
def renamed_to_another_directory(w: Watched) -> None:
    w.at("a/b/three").rename(w.at("quiet/three"))


@change("a/b/", "quiet/")
def renamed_over(w: Watched) -> None:
    w.at("a/b/three").rename(w.at("quiet/five"))


@change("", "a/", "empty/", "quiet/b/", "quiet/b/c/", "quiet/")
def directory_moved(w: Watched) -> None:
    w.at("a/b").rename(w.at("quiet/b"))
    w.at("empty").rename(w.at("still-empty"))
    w.at("still-empty").rename(w.at("empty"))


@change("", "empty/", "empty/c/", "a/")
def directory_moved_over_an_empty_one(w: Watched) -> None:
    w.at("a/b").rename(w.at("empty"))


@change("", "a/", "a/below/", "quiet/", "quiet/b/", "quiet/b/c/")
def directories_exchanged(w: Watched) -> None:
    here = os.open(w.workspace, os.O_RDONLY)
    try:
        assert ctypes.CDLL(None).renameat2(here, b"a", here, b"quiet", RENAME_EXCHANGE) == 0
    finally:
        os.close(here)


@change("", "a/", "a/b/", "elsewhere/", "elsewhere/b/", "elsewhere/b/c/")
def directory_moved_and_its_place_taken(w: Watched) -> None:
    w.at("a").rename(w.at("elsewhere"))
    w.at("a/b").mkdir(parents=True)
    w.at("elsewhere/b/c/four").write_bytes(b"after the move")


@change("", "a/", "a/b/")
def file_becomes_directory_and_back(w: Watched) -> None:
    w.at("one").unlink()
    w.at("one").mkdir()
    w.at("one").rmdir()
    shutil.rmtree(w.at("a/b"))
    w.at("a/b").write_bytes(b"a file now")
    w.at("a/b").unlink()
    w.at("a/b").mkdir()


@change("a/")
def file_becomes_link(w: Watched) -> None:
    w.at("a/two").unlink()
    w.at("a/two").symlink_to("../one")


@change(everything=True)
def new_hard_link_in_another_directory(w: Watched) -> None:
    """The directory of the first name hears nothing of the second."""
    os.link(w.at("a/two"), w.at("quiet/two"))


@change("a/b/")
def store_through_a_mapping_that_is_gone(w: Watched) -> None:
    with w.at("a/b/three").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[:3] = b"XYZ"


def is_seen(watched: Watched, captured: TreeCapture) -> None:
    assert flat(captured) == watched.everything()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_every_kind_of_change_is_seen_by_looking_only_where_it_was(watched: Watched, change: Change) -> None:
    change.make(watched)
    watched.listed.clear()
    captured = watched.cut()
    if change.listed is not None:
        assert watched.listed <= change.listed
    is_seen(watched, captured)
    watched.listed.clear()
    assert watched.cut().root is watched.index.root  # type: ignore[union-attr]
    if change.listed is not None:
        assert watched.listed == set()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_a_change_is_seen_after_any_other(watched: Watched, change: Change) -> None:
    """The watches that the first change used up are armed again, also where directories went elsewhere."""
    change.make(watched)
    watched.cut()
    for where, directories, files in os.walk(watched.workspace):
        for name in files:
            path = Path(where, name)
            if stat.S_ISREG(path.lstat().st_mode):
                with path.open("ab") as file:
                    file.write(b"again")
        for name in directories:
            Path(where, name, "another").touch()
    is_seen(watched, watched.cut())


class TestWithoutATrace:
    """What makes no event in the directory, and moves no time stamp, or only that of another name."""

    def test_store_through_a_mapping_is_seen_while_the_file_is_open(self, watched: Watched) -> None:
        with watched.at("a/b/three").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
            for letter in (b"X", b"Y"):
                mapping[:1] = letter
                captured = watched.cut(always_reread=frozenset([os.fstat(file.fileno()).st_ino]))
                is_seen(watched, captured)
            mapping[:1] = b"Z"
        is_seen(watched, watched.cut())

    def test_what_was_open_at_the_last_cut_is_seen_even_if_its_name_is_another_by_then(self, watched: Watched) -> None:
        """It is written to, and closed, through the name that was removed."""
        with watched.at("a/two").open("r+b") as file:
            os.link(watched.at("a/two"), watched.at("quiet/two"))
            watched.at("a/two").unlink()
            watched.cut(always_reread=frozenset([os.fstat(file.fileno()).st_ino]))
            file.write(b"through the old name")
        watched.listed.clear()
        is_seen(watched, watched.cut())
        assert b"quiet/" in watched.listed

    def test_change_through_another_link_is_seen(self, watched: Watched) -> None:
        os.link(watched.at("a/two"), watched.at("quiet/two"))
        for _ in range(3):
            watched.cut()
        watched.listed.clear()
        with watched.at("quiet/two").open("ab") as file:
            file.write(b"more")
        captured = watched.cut()
        is_seen(watched, captured)
        assert watched.listed == {b"a/", b"quiet/"}

    def test_name_of_a_file_with_several_links_goes(self, watched: Watched) -> None:
        os.link(watched.at("a/two"), watched.at("quiet/two"))
        watched.cut()
        watched.at("quiet/two").unlink()
        is_seen(watched, watched.cut())

    def test_third_link_is_one_more_name_of_the_file(self, watched: Watched) -> None:
        os.link(watched.at("a/two"), watched.at("quiet/two"))
        watched.cut()
        os.link(watched.at("a/two"), watched.at("empty/two"))
        is_seen(watched, watched.cut())

    def test_change_through_a_name_that_was_removed_before_the_cut_is_seen(self, watched: Watched) -> None:
        """The driver names such a file, though it is open for reading only."""
        with watched.at("a/two").open("rb") as file:
            os.link(watched.at("a/two"), watched.at("quiet/two"))
            watched.at("a/two").unlink()
            by_removed_name = frozenset([os.fstat(file.fileno()).st_ino])
            watched.cut(always_reread=by_removed_name)
            os.fchmod(file.fileno(), 0o751)
            is_seen(watched, watched.cut(always_reread=by_removed_name))
            os.fchmod(file.fileno(), 0o700)
        is_seen(watched, watched.cut())

    def test_all_is_read_twice_when_nobody_knows_what_is_open(self, watched: Watched) -> None:
        assert watched.cut(always_reread=None).staged_bytes > 0
        assert watched.cut().staged_bytes > 0
        assert watched.cut().staged_bytes == 0

    def test_directory_of_a_file_that_was_fresh_at_a_cut_is_listed_at_the_next(self, watched: Watched) -> None:
        path = watched.at("a/b/three")
        path.write_bytes(b"fresh")
        watched.clock = StillClock(path.stat().st_ctime_ns + 19_000_000)
        watched.cut()
        watched.listed.clear()
        watched.clock = StillClock(path.stat().st_ctime_ns + 1_000_000_000)
        captured = watched.cut()
        assert watched.listed == {b"a/b/"}
        assert captured.staged_bytes == 5
        watched.listed.clear()
        watched.cut()
        assert watched.listed == set()


class TestLost:
    """Everything is looked at when it is not certain what was heard."""

    def test_capture_that_was_not_stored_loses_nothing(self, watched: Watched) -> None:
        watched.at("a/two").write_bytes(b"first")
        watched.cut(committed=False)
        watched.at("quiet/five").write_bytes(b"second")
        watched.cut(committed=False)
        watched.listed.clear()
        is_seen(watched, watched.cut())
        assert watched.listed == {b"a/", b"quiet/"}

    def test_capture_that_failed_loses_nothing(self, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("one", "a/two", "a/b/three", "quiet/five"):
            watched.at(name).write_bytes(b"changed")
        with monkeypatch.context() as patched:
            patched.setattr("torpor.snapshots.scan.open_file", _fails_at(3))
            with pytest.raises(Exception, match="cannot capture"):
                watched.cut()
        watched.at("a/b/c/four").write_bytes(b"changed later")
        is_seen(watched, watched.cut())
        watched.at("a/b/three").write_bytes(b"changed last")
        is_seen(watched, watched.cut())

    def test_index_of_another_watch_is_not_trusted(self, watched: Watched) -> None:
        other = DirectoryWatch()
        watched.at("a/two").write_bytes(b"seen by the first watch only")
        watched.watch, first = other, watched.watch
        watched.listed.clear()
        is_seen(watched, watched.cut())
        assert b"quiet/below/" in watched.listed
        watched.listed.clear()
        watched.cut()
        assert watched.listed == set()
        first.close()

    def test_events_that_the_kernel_dropped_make_the_capture_look_at_everything(self, watched: Watched) -> None:
        most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
        for number in range(most // 2 + 100):  # Each directory's watch speaks once, and then that it is gone.
            watched.at(f"d{number}").mkdir()
        watched.cut()
        for number in range(most // 2 + 100):
            watched.at(f"d{number}/file").touch()
        watched.listed.clear()
        is_seen(watched, watched.cut())
        assert b"quiet/below/" in watched.listed
        watched.listed.clear()
        watched.at("d5/file").write_bytes(b"x")
        is_seen(watched, watched.cut())
        assert watched.listed == {b"d5/"}

    def test_closed_watch_makes_the_capture_look_at_everything(self, watched: Watched) -> None:
        watched.watch.close()
        watched.at("a/two").write_bytes(b"x")
        captured = watched.cut()
        is_seen(watched, captured)
        assert captured.generation == 0


def _fails_at(number: int) -> Callable[..., object]:
    from torpor.snapshots.scan import open_file

    calls = iter(range(1, number + 1))

    def failing(*arguments: object, **named: object) -> object:
        if next(calls, number) == number:
            raise OSError(5, "Input/output error")
        return open_file(*arguments, **named)  # type: ignore[arg-type]

    return failing


LIMITED = """
import sys
from pathlib import Path
limit, most = sys.argv[2].split("=")
Path("/proc/sys/user/max_inotify_" + limit).write_text(most)
from tests.unit.snapshots.test_watch import Watched, open_watch
from tests.unit.snapshots.making import flat
if limit == "instances":
    assert open_watch() is None
    sys.exit(print("ok"))
watched = Watched(Path(sys.argv[1]))
for number in range(5):
    watched.at(f"d{number}").mkdir()
for _ in range(3):
    watched.at("d1/file").write_bytes(b"x")
    captured = watched.cut()
    assert flat(captured) == watched.everything()
    assert captured.generation == 0
print("ok")
"""


@pytest.mark.parametrize("limit", ["watches=3", "instances=0"])
def test_machine_without_watches_left_is_no_error(tmp_path: Path, limit: str) -> None:
    """In a user namespace of its own, where the limits can be set."""
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", LIMITED, str(tmp_path), limit],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare failed" in done.stderr or "Read-only" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.stdout == "ok\n", done.stderr


def test_restored_workspace_is_watched_from_the_beginning(tmp_path: Path) -> None:
    world = World(tmp_path)
    (world.workspace / "d" / "deep").mkdir(parents=True)
    for name in ("d/file", "d/deep/file", "linked"):
        (world.workspace / name).write_bytes(name.encode())
    os.link(world.workspace / "linked", world.workspace / "d" / "linked")
    saved = world.save("a")
    world.workspace = world.fresh("restored")
    index = settled(world.store.restore_workspace(saved.id, saved.manifest_digest, world.workspace))
    watch = open_watch()
    assert watch is not None
    index = watch_tree(world.workspace, index, watch)
    untouched = capture(world.workspace, world.fresh("staging"), index, watch=watch)
    assert untouched.root is index.root
    time_stamps_move(world.root)
    (world.workspace / "d" / "deep" / "file").write_bytes(b"changed")
    changed = capture(world.workspace, world.fresh("staging"), index, watch=watch)
    assert changed.staged_bytes == len("changed")
    assert flat(changed) == flat(capture(world.workspace, world.fresh("staging")))
    watch.close()
