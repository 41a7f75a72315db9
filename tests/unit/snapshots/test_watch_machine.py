"""Any sequence of what a program can do to its files, cut anywhere: a watched capture finds what a full one
finds, and what is stored of it restores to that.
"""

import contextlib
import ctypes
import mmap
import os
import shutil
import stat
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from tests.unit.snapshots.making import KEY, StillClock, World, flat, settled, time_stamps_move

from torpor.core.clock import SystemClock
from torpor.core.ids import SnapshotId
from torpor.snapshots.capture import TreeCapture, capture, watch_tree
from torpor.snapshots.store import SavedSnapshot
from torpor.snapshots.watch import DirectoryWatch

NAMES = st.sampled_from(["a", "b", "c", "\udcff"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
BODIES = st.binary(max_size=20) | st.just(b"x" * 300_000) | st.just(bytes(70_000) + b"y" * 200_000)
AN_HOUR_NS = 3_600_000_000_000
AT_FDCWD, EXCHANGE = -100, 2
_renameat2 = ctypes.CDLL(None).renameat2


class Workspace(RuleBasedStateMachine):
    """What a rule can't do in the tree as it is (a name is missing, or is of another kind) it leaves."""

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="torpor-watch-"))
        self.world = World(self.root)
        self.workspace = self.world.workspace
        self.watch = DirectoryWatch()
        self.saved: SavedSnapshot | None = None
        self.index = None
        self.held: list[int] = []
        self.count = 0

    def teardown(self) -> None:
        for descriptor in self.held:
            os.close(descriptor)
        self.watch.close()
        shutil.rmtree(self.root)

    def at(self, path: str) -> str:
        return f"{self.workspace}/{path}"

    @rule(path=PATHS)
    def make_directory(self, path: str) -> None:
        with contextlib.suppress(OSError):
            os.makedirs(self.at(path))

    @rule(path=PATHS, body=BODIES)
    def write_file(self, path: str, body: bytes) -> None:
        with contextlib.suppress(OSError), open(self.at(path), "wb") as file:
            file.write(body)

    @rule(path=PATHS, size=st.integers(0, 400_000))
    def set_size(self, path: str, size: int) -> None:
        with contextlib.suppress(OSError):
            os.truncate(self.at(path), size)

    @rule(path=PATHS, to=PATHS)
    def make_symbolic_link(self, path: str, to: str) -> None:
        with contextlib.suppress(OSError):
            os.symlink(to, self.at(path))

    @rule(path=PATHS, mode=st.sampled_from([0o600, 0o755, 0o1777, 0o444]))
    def set_mode(self, path: str, mode: int) -> None:
        with contextlib.suppress(OSError):
            if not stat.S_ISLNK(os.lstat(self.at(path)).st_mode):
                os.chmod(self.at(path), mode | (0o700 if os.path.isdir(self.at(path)) else 0o600))

    @rule(path=PATHS, mtime_ns=st.integers(0, 2**60))
    def set_times(self, path: str, mtime_ns: int) -> None:
        with contextlib.suppress(OSError):
            os.utime(self.at(path), ns=(mtime_ns, mtime_ns), follow_symlinks=False)

    @rule(path=PATHS, name=st.sampled_from([b"user.one", b"user.\xff"]), value=st.binary(max_size=5))
    def set_attribute(self, path: str, name: bytes, value: bytes) -> None:
        with contextlib.suppress(OSError):
            os.setxattr(self.at(path), name, value, follow_symlinks=False)

    @rule(path=PATHS, to=PATHS)
    def rename(self, path: str, to: str) -> None:
        with contextlib.suppress(OSError):
            os.rename(self.at(path), self.at(to))

    @rule(path=PATHS, to=PATHS)
    def exchange(self, path: str, to: str) -> None:
        _renameat2(AT_FDCWD, os.fsencode(self.at(path)), AT_FDCWD, os.fsencode(self.at(to)), EXCHANGE)

    @rule(path=PATHS, to=PATHS)
    def link(self, path: str, to: str) -> None:
        with contextlib.suppress(OSError):
            os.link(self.at(path), self.at(to), follow_symlinks=False)

    @rule(path=PATHS)
    def remove(self, path: str) -> None:
        with contextlib.suppress(OSError):
            if os.path.isdir(self.at(path)) and not os.path.islink(self.at(path)):
                shutil.rmtree(self.at(path))
            else:
                os.unlink(self.at(path))

    @rule(path=PATHS)
    def hold_open(self, path: str) -> None:
        with contextlib.suppress(OSError):
            self.held.append(os.open(self.at(path), os.O_RDWR))

    @rule(at=st.integers(0, 3), body=st.binary(min_size=1, max_size=5))
    def write_to_held(self, at: int, body: bytes) -> None:
        if at < len(self.held):
            os.pwrite(self.held[at], body, 0)

    @rule(at=st.integers(0, 3), mode=st.sampled_from([0o600, 0o640]))
    def set_mode_of_held(self, at: int, mode: int) -> None:
        if at < len(self.held):
            os.fchmod(self.held[at], mode)

    @rule(at=st.integers(0, 3), letter=st.integers(1, 255))
    def store_through_mapping_of_held(self, at: int, letter: int) -> None:
        if at < len(self.held) and os.fstat(self.held[at]).st_size:
            with mmap.mmap(self.held[at], 0) as mapping:
                mapping[0] = letter

    @rule(at=st.integers(0, 3))
    def let_go(self, at: int) -> None:
        if at < len(self.held):
            os.close(self.held.pop(at))

    @rule()
    def capture_that_fails_later(self) -> None:
        self.check(self.capture())

    @rule()
    def cut(self) -> None:
        captured = self.capture()
        self.check(captured)
        self.count += 1
        with self.world.store.lease() as lease:
            self.saved = self.world.store.save(
                image_dir=self.world.image,
                workspace=captured,
                parent=self.saved and self.saved.ref,
                pins={},
                snapshot_id=SnapshotId(f"snp_{self.count}"),
                key=KEY,
                lease=lease,
            )
        self.index = self.saved.tree

    @rule()
    def restore_and_go_on_there(self) -> None:
        """Another life: its watch begins with what a restore wrote."""
        if self.saved is None:
            return
        for descriptor in self.held:
            os.close(descriptor)
        self.held.clear()
        self.watch.close()
        self.workspace = self.world.fresh("life")
        index = self.world.store.restore_workspace(self.saved.ref, self.workspace)
        self.watch = DirectoryWatch()
        self.index = watch_tree(self.workspace, settled(index), self.watch)

    def capture(self) -> TreeCapture:
        """No file counts as fresh, so that nothing but the watch says where to look."""
        time_stamps_move(self.root)
        return capture(
            self.workspace,
            self.world.fresh("staging"),
            self.index,
            always_reread=frozenset(os.fstat(descriptor).st_ino for descriptor in self.held),
            watch=self.watch,
            clock=StillClock(SystemClock().wall_ns() + AN_HOUR_NS),
        )

    def check(self, captured: TreeCapture) -> None:
        assert flat(captured) == flat(capture(self.workspace, self.world.fresh("staging")))


class RestoredWorkspace(Workspace):
    """Each cut is also restored, and compared by a capture of what that wrote."""

    @rule()
    def cut(self) -> None:
        super().cut()
        assert self.saved is not None
        restored = self.world.restored_workspace(self.saved)
        there = flat(capture(restored, self.world.fresh("staging")))
        assert there == flat(capture(self.workspace, self.world.fresh("staging")))


TestWatched = Workspace.TestCase
TestWatched.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestRestored = RestoredWorkspace.TestCase
TestRestored.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
