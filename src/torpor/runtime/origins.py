"""What a person means by `--at` and `--to`: a checkpoint's number, `turn:N`, or nothing, which is now."""

from collections.abc import Callable

from torpor.core.call import Call, CallState
from torpor.core.checkpoint import restore_order
from torpor.core.errors import Conflict, InvalidInput, NotFound
from torpor.core.ids import CallId, SessionId
from torpor.core.origin import Origin, at_checkpoint, at_turn
from torpor.db import calls, checkpoints, rewinds
from torpor.db.database import Transaction

_TURN = "turn:"


def find_origin(
    tx: Transaction, session_id: SessionId, at: str | None, *, branches: bool, pump_alive: Callable[[Call], bool]
) -> Origin:
    """Args:
        branches: what a rewind left counts too.
        pump_alive: whether a call that was sent gets its answer still.

    Raises:
        InvalidInput: `origin_malformed`.
        NotFound: `checkpoint_not_found`, `turn_not_found`.
        Conflict: `session_without_checkpoint`; `turn_without_checkpoint`; `origin_left`: it is on a branch that a
            rewind left.
    """
    if at is None:
        return _newest(tx, session_id, pump_alive)
    if at.startswith(_TURN):
        return _turn(tx, session_id, _number(at, at.removeprefix(_TURN)), branches=branches)
    return _checkpoint(tx, session_id, _number(at, at), branches=branches)


def number_of_turn(tx: Transaction, session_id: SessionId, past_seq: int) -> int:
    """How many turns of a session had begun by an event."""
    return sum(call.is_llm and call.intended_seq <= past_seq for call in calls.load_calls(tx, session_id))


def _number(at: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise InvalidInput(
            "origin_malformed",
            f"cannot go to {at!r}: it is neither a checkpoint's number nor turn:N",
            hint="`torpor checkpoints SESSION` and `torpor turns SESSION` list the numbers.",
        )
    return int(text)


def _newest(tx: Transaction, session_id: SessionId, pump_alive: Callable[[Call], bool]) -> Origin:
    """The one that a recovery would take."""
    made = {call.call_id: call for call in calls.load_calls(tx, session_id)}

    def alive(call_id: CallId) -> bool:
        return made[call_id].state is CallState.SENT and pump_alive(made[call_id])

    order = restore_order(checkpoints.list_intact(tx, session_id), made, alive)
    if not order:
        raise _without(session_id)
    return at_checkpoint(order[0])


def _checkpoint(tx: Transaction, session_id: SessionId, number: int, *, branches: bool) -> Origin:
    point = checkpoints.numbered(tx, session_id, number)
    if point is None:
        raise NotFound(
            "checkpoint_not_found",
            f"cannot go to checkpoint {number} of session {session_id}: there is none",
            hint=f"`torpor checkpoints {session_id}` lists them.",
        )
    if not branches and number in checkpoints.list_left(tx, session_id):
        raise _left(session_id, f"checkpoint {number}", str(number))
    return at_checkpoint(point)


def _turn(tx: Transaction, session_id: SessionId, number: int, *, branches: bool) -> Origin:
    made = calls.list_llm(tx, session_id)
    if not 1 <= number <= len(made):
        raise NotFound(
            "turn_not_found",
            f"cannot go to turn {number} of session {session_id}: it has {len(made)}",
            hint="`torpor turns SESSION` lists them.",
        )
    call = calls.load_call(tx, made[number - 1])
    if not branches and not rewinds.past_of(tx, session_id).timeline.holds(call.intended_seq):
        raise _left(session_id, f"turn {number}", f"turn:{number}")
    then = rewinds.past_of(tx, session_id, before_seq=call.intended_seq).timeline
    points = [point for point in checkpoints.list_intact(tx, session_id, branches=branches) if then.holds(point.seq)]
    origin = at_turn(points, call)
    if origin is None:
        raise Conflict(
            "turn_without_checkpoint",
            f"cannot go to turn {number} of session {session_id}: no checkpoint leads to it",
            hint=f"`torpor checkpoints {session_id}` lists those that there are.",
        )
    return origin


def _left(session_id: SessionId, what: str, at: str) -> Conflict:
    return Conflict(
        "origin_left",
        f"cannot rewind session {session_id} to {what}: an earlier rewind left it",
        hint=f"`torpor fork {session_id} --at {at}` goes on from there.",
    )


def _without(session_id: SessionId) -> Conflict:
    return Conflict("session_without_checkpoint", f"cannot fork session {session_id}: it has no checkpoint")
