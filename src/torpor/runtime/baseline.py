"""What the next capture of a workspace may take as unchanged: the tree of the newest committed checkpoint, with care.

A capture is compared with a tree that is in the store, never with one that only waits to be: that one may be
overtaken or fail, and what was left out as unchanged would be nowhere. Stores through a mapping move no time stamp,
and a file that is closed by now may have been open at a cut in between, which read it again and was never committed.
So every file counts as changed that was open for writing at a cut since the tree's own, and at that one. Pure.
"""

from torpor.snapshots.tree import TreeIndex

OpenFiles = frozenset[int] | None
"""Inodes of the files that the sandbox had open for writing at a cut; None when nobody could tell."""


class Baseline:
    """One life's; cuts are known by their numbers in the commit queue."""

    def __init__(self) -> None:
        self._tree: TreeIndex | None = None
        self._of_cut = 0
        self._open_at: dict[int, OpenFiles] = {}

    def begin(self, tree: TreeIndex | None) -> None:
        """A life begins with this tree in its workspace; None: what is in there was not compared with anything."""
        self._tree = tree
        self._open_at.clear()

    def lost(self) -> None:
        """What was compared with may be damaged: the next capture reads everything."""
        self._tree = None

    def cut(self, number: int, open_files: OpenFiles) -> None:
        """A capture was made at this cut, whatever becomes of it."""
        self._open_at[number] = open_files

    def committed(self, number: int, tree: TreeIndex) -> None:
        """This cut's capture is in the store as this tree."""
        self._tree, self._of_cut = tree, number
        self._open_at = {cut: files for cut, files in self._open_at.items() if cut >= number}

    def compare(self, open_now: OpenFiles) -> tuple[TreeIndex | None, frozenset[int]]:
        """The tree to compare with, and the inodes to read whatever their stamps say; no tree: read everything."""
        if open_now is None:
            return None, frozenset()
        uncertain = set(open_now)
        for cut, files in self._open_at.items():
            if files is not None:
                uncertain |= files
            elif cut > self._of_cut:
                return None, frozenset()
        return self._tree, frozenset(uncertain)
