"""A workspace that is watched, for the tests of what a watch hears."""

from pathlib import Path

from tests.unit.snapshots.making import HashingWriter, StillClock, World, flat, time_stamps_move

from torpor.core.clock import SystemClock
from torpor.core.ids import SnapshotId
from torpor.snapshots.capture import TreeCapture, capture, store_tree
from torpor.snapshots.tree import TreeIndex
from torpor.snapshots.watch import DirectoryWatch


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


def is_seen(watched: Watched, captured: TreeCapture) -> None:
    assert flat(captured) == watched.everything()
