"""What a watch heard stands for a look at every file: whatever happens, a watched capture finds what a full one
finds.
"""

import ctypes
import mmap
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.unit.snapshots.making import StillClock
from tests.unit.snapshots.watching import Watched, is_seen

RENAME_EXCHANGE = 2


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
