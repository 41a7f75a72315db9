"""How a stream ended, and what that means for an equal request that comes after it (RECOVERY 5.4).

A call has at most one attached stream. While one is attached, and after one consumed the answer, an equal request is a
new call: five equal requests on purpose are five. When the stream ended short of that, an equal request is the client's
retry: it joins the call from the first byte of its answer.
"""

from enum import StrEnum


class StreamEnd(StrEnum):
    """How the last stream of a call ended, as init's CLOSED says it."""

    CONSUMED = "consumed"
    """The agent's socket took every byte up to our end, and the client then closed in order."""
    GONE = "gone"
    """Closed by the client before that, with RST, or with a write error. RST with unread data is not consumed."""
    RESET = "reset"
    """Closed by the host: a truncated upstream, a torn answer, a stream that a restore could not continue."""


CLOSED_HOW = {1: StreamEnd.CONSUMED, 2: StreamEnd.GONE, 3: StreamEnd.RESET}
"""The byte `how` of the init protocol's CLOSED."""

REFUSAL_STATUS_MIN = 400


def end_of_stream(reported: StreamEnd, status: int | None) -> StreamEnd:
    """What a stream's end counts as, given the status of its answer; None: nothing of that came yet.

    Clients close a refusal unread before they try again: they know its status and want another answer, and nothing was
    paid for this one. Joined to it, an agent would get the same refusal for ever.
    """
    if reported is StreamEnd.GONE and status is not None and status >= REFUSAL_STATUS_MIN:
        return StreamEnd.CONSUMED
    return reported


def may_join(end: StreamEnd | None) -> bool:
    """Whether a new equal request joins the call whose stream ended so; None is a stream that is still attached."""
    return end is StreamEnd.GONE or end is StreamEnd.RESET
