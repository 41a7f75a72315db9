"""Which turns are checkpointed: as many as a share of the session's wall time pays for. Pure.

What a checkpoint costs is time that the agent lost to it and that is known: the freeze, unless the model was thinking
all the while, and the wait of an answer whose first byte was there. Each second that passes earns the share of a
second; what the last checkpoints cost and is not earned yet is owed, and while something is owed turns are skipped:
the log covers them. Who asks for a checkpoint gets it, whatever is owed, and its cost is owed like any other.

    cost of the checkpoints made at turns, in any stretch of time
        <= share * (its length + SAVED_SECONDS) + the dearest single one of them

not counting the first of a life, which is always made: before it, a crash would undo all that the life did.
"""

from dataclasses import dataclass

from torpor.core.errors import InvalidInput

EVERY_TURN_PPM = 0
SHARE_PPM = 50_000
"""5 %, unless somebody says otherwise."""
SAVED_SECONDS = 60.0
"""A quiet time saves up for no more than this long: after it the agent is not stopped at every turn for minutes."""
_PPM = 1_000_000


@dataclass(slots=True)
class Pace:
    """What one session owes for its checkpoints. Times are seconds of one clock that only rises.

    Attributes:
        share_ppm: millionths of the wall time; EVERY_TURN_PPM skips nothing.
        owed: seconds that were lost and not earned at `at`; below zero is saved up.
        charged_to: the end of the last time that was charged.
        is_first: no turn of the present life has been checkpointed yet.
    """

    share_ppm: int
    at: float
    owed: float = 0.0
    charged_to: float = float("-inf")
    is_first: bool = True

    def begin_life(self) -> None:
        """The sandbox was booted or restored, or another node's was adopted."""
        self.is_first = True

    def due(self, now: float) -> bool:
        """Whether a turn that begins now is checkpointed."""
        return self.is_first or self.share_ppm == EVERY_TURN_PPM or self.owed_seconds(now) <= 0

    def owed_seconds(self, now: float) -> float:
        """What is not earned yet."""
        self._earn(now)
        return max(0.0, self.owed)

    def begun(self) -> None:
        """A turn is being checkpointed."""
        self.is_first = False

    def charge(self, start: float, end: float) -> float:
        """The agent lost the time from `start` to `end`; gives what of it was not charged before.

        Calls that are made at once wait for one checkpoint at the same time. Say it in the order of the ends.
        """
        lost = max(0.0, end - max(start, self.charged_to))
        self.charged_to = max(self.charged_to, end)
        self._earn(end)
        self.owed += lost
        return lost

    def _earn(self, now: float) -> None:
        share = self.share_ppm / _PPM
        self.owed = max(self.owed - share * max(0.0, now - self.at), -share * SAVED_SECONDS)
        self.at = max(self.at, now)


def parse_share(text: str) -> int:
    """Millionths from what a person writes: `5%`, `0.5%`, `always` or `0`.

    Raises:
        InvalidInput: `share_malformed`.
    """
    if text in ("always", "0"):
        return EVERY_TURN_PPM
    number, percent, rest = text.partition("%")
    try:
        share_ppm = round(float(number) / 100 * _PPM)
    except (ValueError, OverflowError):
        share_ppm = -1
    if not percent or rest or not 0 < share_ppm <= _PPM:
        raise InvalidInput(
            "share_malformed",
            f"cannot read the checkpoint share {text!r}: it is neither a percentage up to 100% nor `always`",
            hint="5% is the default; `always` (or 0) makes a checkpoint at every turn.",
        )
    return share_ppm


def share_text(share_ppm: int) -> str:
    """The same, written again."""
    return "always" if share_ppm == EVERY_TURN_PPM else f"{share_ppm * 100 / _PPM:g}%"
