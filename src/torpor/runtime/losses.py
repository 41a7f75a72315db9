"""Ends the attempt of a session whose sandbox dies again and again: what kills it would go on for ever."""

from torpor.core.clock import Clock
from torpor.core.errors import SandboxFailed
from torpor.core.events import Kind
from torpor.db import log
from torpor.runtime.records import Records

IN_A_ROW_MAX = 5
YOUNG_SECONDS = 60.0
"""A life that lasted longer did not die of how it began, whether its agent got further or waited."""
PROGRESS = (Kind.CALL_INTENDED, Kind.CALL_COMPLETED, Kind.CHECKPOINT_COMMITTED)
"""A recovery writes events too, but none of these."""


class Losses:
    """Of the sandboxes that one node has had for one session."""

    def __init__(self, records: Records, clock: Clock) -> None:
        self._records = records
        self._clock = clock
        self._in_a_row = 0
        self._progress = -1

    async def add(self, began_at: float) -> None:
        """A sandbox died.

        Args:
            began_at: when its life was asked for, in seconds of the monotonic clock.

        Raises:
            SandboxFailed: `session_crash_loop`.
        """
        counts = await self._records.database.read(lambda tx: log.counts(tx, self._records.session_id))
        progress = sum(counts[kind] for kind in PROGRESS)
        was_old = self._clock.monotonic() - began_at > YOUNG_SECONDS
        self._in_a_row = 1 if was_old or progress > self._progress else self._in_a_row + 1
        self._progress = progress
        if self._in_a_row >= IN_A_ROW_MAX:
            raise SandboxFailed(
                "session_crash_loop",
                f"cannot keep session {self._records.session_id} running: its sandbox dies again and again",
                hint="`torpor log SESSION` has the reasons; `torpor resume SESSION` tries again.",
            )

    def forget(self) -> None:
        """The agent failed by itself, which is for its policy of restarts to judge."""
        self._in_a_row = 0
