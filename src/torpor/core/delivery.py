"""From log rows to the next bytes on an agent's socket (RECOVERY 2.2).

Live and repeated delivery are this one path: it is fed rows of one attempt in order, whether they were written just
now or a month ago, and returns what the stream lacks. Its bytes are a pure function of the rows, so a restored agent
that had taken `start` of them goes on in the middle of a chunk as if nothing had happened.
"""

from torpor.core.call import CONTINUE, ResponseHead, chunk_bytes, head_bytes, tail_bytes


class Tape:
    """The response bytes of one attempt, from offset `start` (init's V) on.

    Attributes:
        position: offset after the last byte returned; the offset of the next DATA frame.
        ended: the clean end was returned, so FIN may be sent.
    """

    __slots__ = ("_head", "_rendered", "ended", "position")

    def __init__(self, start: int = 0) -> None:
        self.position = start
        self.ended = False
        self._rendered = 0
        self._head: ResponseHead | None = None

    def continue_(self) -> bytes:
        """100 Continue is due before the head is known. Its bytes are the beginning of a head with `continued`."""
        return self._emit(CONTINUE, at=0)

    def head(self, head: ResponseHead) -> bytes:
        if self._head is not None:
            raise ValueError("cannot deliver a second head: a stream receives one attempt")
        self._head = head
        return self._append(head_bytes(head))

    def chunk(self, chunk: bytes) -> bytes:
        return self._append(chunk_bytes(self._known_head(), chunk))

    def finish(self) -> bytes:
        """The attempt is answered: what ends it. Without this call a stream never ends cleanly."""
        self.ended = True
        return self._append(tail_bytes(self._known_head()))

    def _known_head(self) -> ResponseHead:
        if self._head is None:
            raise ValueError("cannot deliver a body before its head")
        return self._head

    def _append(self, rendered: bytes) -> bytes:
        at = self._rendered
        self._rendered += len(rendered)
        return self._emit(rendered, at=at)

    def _emit(self, rendered: bytes, *, at: int) -> bytes:
        fresh = rendered[max(0, self.position - at) :]
        self.position += len(fresh)
        return fresh


def untouched_bytes(head: ResponseHead | None, *, continued: bool) -> int:
    """Response bytes that are no part of an answer, for `OpenStream.untouched_bytes`: the interim 100 Continue."""
    return len(CONTINUE) if continued or (head is not None and head.continued) else 0
