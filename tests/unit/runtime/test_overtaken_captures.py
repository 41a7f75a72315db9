"""Whatever becomes of the cuts before it, a committed checkpoint has the workspace of its cut, to the byte."""

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.snapshots.making import IDS, KEY, settled

from torpor.core.ids import SnapshotId
from torpor.runtime.cutting import Base
from torpor.snapshots.backend import LocalDirectory
from torpor.snapshots.capture import TreeCapture, capture
from torpor.snapshots.manifest import SnapshotRef
from torpor.snapshots.store import SnapshotStore
from torpor.snapshots.watch import open_watch

NAMES = ("a", "d/b")


@dataclass(frozen=True)
class Cut:
    number: int
    captured: TreeCapture
    base: Base
    contents: dict[str, bytes]


class Session:
    """A workspace, its cuts and a store, as the checkpointer drives them: one commit in progress, one cut waiting."""

    def __init__(self, root: Path) -> None:
        self.workspace = root / "workspace"
        self._root = root
        (self.workspace / "d").mkdir(parents=True)
        (root / "image").mkdir()
        for name in NAMES:
            (self.workspace / name).write_bytes(b"0" * 64)
        self.store = SnapshotStore(LocalDirectory(root / "store"), IDS)
        self.base = Base()
        self.watch = open_watch()
        self.parent: SnapshotRef | None = None
        self.mapped: dict[str, mmap.mmap] = {}
        self.in_progress: Cut | None = None
        self.waiting: Cut | None = None
        self.cuts = 0
        self._times = 0

    def write(self, name: str) -> None:
        """An ordinary write, which moves the file's times."""
        self._times += 1
        path = self.workspace / name
        path.write_bytes(b"%064d" % self._times)
        os.utime(path, ns=(self._times, self._times))

    def map(self, name: str) -> None:
        """Map a file and store to it, which moves its times; later stores don't, as long as the page stays dirty."""
        if name not in self.mapped:
            with (self.workspace / name).open("r+b") as file:
                self.mapped[name] = mmap.mmap(file.fileno(), 64)
            self.store_mapped(name)

    def store_mapped(self, name: str) -> None:
        """A store through the mapping; a memory file system cleans no page, so only the first one moves a time."""
        if name in self.mapped:
            self._times += 1
            self.mapped[name][:] = b"m%063d" % self._times

    def unmap(self, name: str) -> None:
        if name in self.mapped:
            self.mapped.pop(name).close()

    def cut(self, open_files: frozenset[int] | None) -> None:
        aside = Path(tempfile.mkdtemp(dir=self._root))
        captured = capture(self.workspace, aside, self.base.tree, always_reread=open_files, watch=self.watch)
        self.cuts += 1
        contents = {name: (self.workspace / name).read_bytes() for name in NAMES}
        self.waiting = Cut(self.cuts, captured, self.base, contents)

    def begin_commit(self) -> None:
        if self.in_progress is None:
            self.in_progress, self.waiting = self.waiting, None

    def fail(self) -> None:
        if self.in_progress is not None:
            self.in_progress = None
            self.base = Base()

    def commit(self) -> None:
        self.begin_commit()
        if self.in_progress is None:
            return
        cut, self.in_progress = self.in_progress, None
        with self.store.lease() as lease:
            saved = self.store.save(
                image_dir=self._root / "image",
                workspace=cut.captured,
                parent=self.parent,
                compared_with=cut.base.ref,
                pins={},
                snapshot_id=SnapshotId(f"snp_{cut.number}"),
                key=KEY,
                lease=lease,
            )
        # As if the cut had come long after every change, so that no file is read again for being fresh.
        self.base = Base(tree=settled(saved.tree), ref=saved.ref)
        self.parent = saved.ref
        target = Path(tempfile.mkdtemp(dir=self._root))
        self.store.restore_workspace(saved.ref, target)
        assert {name: (target / name).read_bytes() for name in NAMES} == cut.contents
        assert self.store.verify(saved.ref) == []

    def close(self) -> None:
        for name in NAMES:
            self.unmap(name)
        if self.watch is not None:
            self.watch.close()
        shutil.rmtree(self._root)

    @property
    def open_files(self) -> frozenset[int]:
        return frozenset((self.workspace / name).stat().st_ino for name in self.mapped)


@pytest.fixture
def session() -> Iterator[Session]:
    root = Path(tempfile.mkdtemp(prefix="torpor-test-", dir="/dev/shm"))
    made = Session(root)
    yield made
    made.close()


names = st.sampled_from(NAMES)
steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["write", "map", "store_mapped", "store_mapped", "unmap"]), names),
        st.tuples(st.sampled_from(["cut", "cut", "cut", "commit", "commit", "begin_commit", "cut_blind", "fail"])),
    ),
    min_size=10,
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(steps)
def test_every_committed_checkpoint_has_the_workspace_of_its_cut(plan: list[tuple[str, ...]]) -> None:
    session = Session(Path(tempfile.mkdtemp(prefix="torpor-test-", dir="/dev/shm")))
    try:
        for step, *names in plan:
            if step in ("cut", "cut_blind"):
                session.cut(session.open_files if step == "cut" else None)
            else:
                getattr(session, step)(*names)
        session.commit()
        session.commit()
    finally:
        session.close()


def test_a_change_that_only_a_dropped_cut_had_captured_is_in_the_next(session: Session) -> None:
    """Also one through a mapping that began after the committed cut and is gone by the next."""
    session.cut(session.open_files)
    session.commit()
    session.write("a")
    session.map("d/b")
    session.store_mapped("d/b")
    session.cut(session.open_files)
    session.unmap("d/b")
    session.cut(session.open_files)  # Takes the place of the one before.
    session.commit()


def test_a_store_between_two_cuts_is_seen_though_the_file_is_closed_at_the_second(session: Session) -> None:
    session.map("a")
    session.cut(session.open_files)
    session.commit()
    session.store_mapped("a")
    session.cut(session.open_files)
    session.store_mapped("a")
    session.unmap("a")
    session.cut(session.open_files)  # Takes the place of the one before.
    session.commit()


def test_a_cut_that_is_made_while_another_is_committed_is_stored_with_what_both_share(session: Session) -> None:
    session.cut(session.open_files)
    session.commit()
    session.write("a")
    session.cut(session.open_files)
    session.begin_commit()
    session.write("d/b")
    session.cut(session.open_files)
    assert session.waiting is not None
    assert session.waiting.base.ref is not None
    assert session.waiting.base.ref.id == "snp_1"
    waiting, session.waiting = session.waiting, None
    session.commit()
    session.waiting = waiting
    session.commit()
    assert session.parent is not None
    assert session.parent.id == "snp_3"


def test_what_a_failed_commit_had_captured_is_in_the_next(session: Session) -> None:
    session.cut(session.open_files)
    session.commit()
    session.write("a")
    session.cut(session.open_files)
    session.begin_commit()
    session.fail()
    session.cut(session.open_files)
    session.commit()
