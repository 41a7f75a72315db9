"""Where cuts wait for their commit: one is being committed, at most one more waits, and a newer one takes its place.

So images in memory stay few however quick turns are, and nobody waits for more than two commits. Whoever asked for a
cut waits until its fate is known: committed, failed, or overtaken by a newer one whose own fate is known. Cuts are
numbered from 1 in the order in which they were made; commits are in that order, so what is known of one is known of
all before.
"""

from typing import Generic, TypeVar

from torpor.sandbox.fifos import Pulse

Cut = TypeVar("Cut")


class CommitQueue(Generic[Cut]):
    """One session's. Attributes: `newest` is the number of the last cut that was put."""

    def __init__(self) -> None:
        self.newest = 0
        self._known = 0
        self._waiting: tuple[int, Cut] | None = None
        self._in_progress = False
        self._changed = Pulse()

    @property
    def idle(self) -> bool:
        return self._waiting is None and not self._in_progress

    def put(self, cut: Cut) -> Cut | None:
        """Queue a cut; gives the one that it overtakes, which is the caller's to discard."""
        overtaken = self._waiting
        self.newest += 1
        self._waiting = (self.newest, cut)
        self._changed.fire()
        return overtaken[1] if overtaken is not None else None

    async def next(self) -> tuple[int, Cut]:
        """The waiting cut with its number; from now on it is in progress, until `done` is said of it."""
        while self._waiting is None:
            await self._changed.wait()
        taken, self._waiting, self._in_progress = self._waiting, None, True
        return taken

    def done(self, number: int) -> None:
        """The cut in progress is committed, or has failed."""
        self._known, self._in_progress = number, False
        self._changed.fire()

    async def known(self, number: int) -> None:
        """Wait until the fate of every cut up to this number is known."""
        while self._known < number:
            await self._changed.wait()

    async def progress(self) -> None:
        """Wait until something is committed, or fails, or is put."""
        await self._changed.wait()
