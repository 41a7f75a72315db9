"""What the agent wrote to stdout and stderr. Positions are the agent's own, so a restored agent writes them again.

Of the output it repeats only what differs is appended (core.output decides). What an incarnation wrote therefore
supersedes, from its first position on, whatever earlier incarnations had there: that is what `read` leaves out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torpor.core.errors import Conflict
from torpor.core.ids import SessionId
from torpor.db.database import Transaction
from torpor.db.fence import refusal

STDOUT, STDERR = 1, 2
_ROWS_AT_ONCE = 64
_END = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputPiece:
    """Some output as it was appended, cut where a later incarnation supersedes it."""

    position: int
    incarnation: int
    wall_ns: int
    data: bytes


def append_output(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    channel: int,
    incarnation: int,
    position: int,
    data: bytes,
    wall_ns: int,
) -> None:
    """Add output of the present incarnation.

    Raises:
        Conflict: `output_refused`, the incarnation is over or its output leaves a gap.
    """
    if not tx.run(
        "output/append_fenced",
        session_id=session_id,
        owner_token=owner_token,
        channel=channel,
        incarnation=incarnation,
        position=position,
        data=data,
        wall_ns=wall_ns,
    ):
        otherwise = Conflict(
            "output_refused",
            f"cannot append output of session {session_id} at {position}: it leaves a gap or its incarnation is over",
        )
        raise refusal(tx, session_id, owner_token, otherwise)


def high_water(tx: Transaction, session_id: SessionId, channel: int) -> int:
    """The position behind the last byte that `read` gives; 0 if there is none."""
    newest = tx.one("output/find_newest", session_id=session_id, channel=channel)
    return 0 if newest is None else newest["position"] + newest["size_bytes"]


def read(tx: Transaction, session_id: SessionId, channel: int, from_position: int = 0) -> bytes:
    """All output from a position on."""
    return b"".join(piece.data for piece in pieces(tx, session_id, channel, from_position))


def pieces(
    tx: Transaction, session_id: SessionId, channel: int, from_position: int = 0, *, limit_bytes: int = _END
) -> list[OutputPiece]:
    """The output from a position on, in order; pieces adjoin. Stops behind the piece that reaches `limit_bytes`."""
    found: list[OutputPiece] = []
    room = limit_bytes
    for piece in _surviving(tx, session_id, channel, from_position):
        found.append(piece)
        room -= len(piece.data)
        if room <= 0:
            break
    return found


def _surviving(tx: Transaction, session_id: SessionId, channel: int, from_position: int) -> Iterator[OutputPiece]:
    starts = tx.all("output/list_starts", session_id=session_id, channel=channel)
    for index, start in enumerate(starts, 1):
        end = min((later["first_position"] for later in starts[index:]), default=_END)
        yield from _of_incarnation(tx, session_id, channel, start["incarnation"], from_position, end)


def _of_incarnation(
    tx: Transaction, session_id: SessionId, channel: int, incarnation: int, from_position: int, end: int
) -> Iterator[OutputPiece]:
    """One incarnation's output between two positions, a few rows at a time."""
    at = from_position
    while at < end:
        rows = tx.all(
            "output/list_between",
            session_id=session_id,
            channel=channel,
            incarnation=incarnation,
            from_position=at,
            to_position=end,
            row_limit=_ROWS_AT_ONCE,
        )
        for row in rows:
            # The first row is the one that `at` lies in or behind: it may have been given already.
            first = max(row["position"], at)
            data = bytes(row["data"])[first - row["position"] : end - row["position"]]
            if data:
                yield OutputPiece(position=first, incarnation=incarnation, wall_ns=row["wall_ns"], data=data)
            at = row["position"] + len(row["data"])
        if len(rows) < _ROWS_AT_ONCE:
            return
