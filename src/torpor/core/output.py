"""Output that a restored agent writes again (RECOVERY 5.5).

Offsets are the agent's own: bytes that it wrote to this pipe since its start, so they are in the image. After a restore
the recorded output beyond the cut is compared with what comes: the equal part is suppressed, the first difference is
marked once, and from there on the new output is the output.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What to do with a piece of output.

    Attributes:
        offset: where `fresh` begins.
        fresh: bytes to record and show; those before them were recorded in an earlier incarnation.
        differs_at: the first offset that differs from the record, once; the record from there on is superseded.
    """

    offset: int
    fresh: bytes
    differs_at: int | None = None


class OutputTrack:
    """One output pipe of one incarnation; `recorded` is what the log has from `position` (the cut's offset) on."""

    __slots__ = ("_recorded", "position")

    def __init__(self, position: int = 0, recorded: bytes = b"") -> None:
        self.position = position
        self._recorded = memoryview(recorded)

    def take(self, piece: bytes) -> Output:
        """Compare the next piece of output."""
        known = min(len(piece), len(self._recorded))
        equal = _equal_bytes(piece[:known], bytes(self._recorded[:known]))
        offset = self.position + equal
        self.position += len(piece)
        if equal < known:
            self._recorded = memoryview(b"")
            return Output(offset=offset, fresh=piece[equal:], differs_at=offset)
        self._recorded = self._recorded[known:]
        return Output(offset=offset, fresh=piece[equal:])

    def finish(self) -> Output:
        """The pipe ended. If the record goes on, this incarnation wrote less: the rest of the record is superseded."""
        differs_at = self.position if self._recorded else None
        self._recorded = memoryview(b"")
        return Output(offset=self.position, fresh=b"", differs_at=differs_at)


def _equal_bytes(one: bytes, other: bytes) -> int:
    """Length of the common beginning of two equally long byte strings."""
    if one == other:
        return len(one)
    low, high = 0, len(one)
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
