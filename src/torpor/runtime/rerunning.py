"""`torpor turn --rerun`: what another model would have said in a turn. A fork whose call is sent to that model.

The child has the other answer in its log, so it can be resumed, and goes on from there. To its agent it is the answer
to the agent's own request, by which it is matched; only what was sent is another one.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torpor.core.errors import InvalidInput
from torpor.core.ids import SessionId
from torpor.db import sessions
from torpor.db.database import Transaction
from torpor.gateway.fetching import fetch_answer
from torpor.runtime import leasing
from torpor.runtime.forking import OtherRequest, Wish, fork
from torpor.runtime.runtime import Runtime
from torpor.runtime.turns import TurnContent, read_call, read_turn

_IN_BODY = frozenset({"anthropic", "openai_chat", "openai_responses"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerun:
    """Attributes:
    old, new: the turn in the parent, and as the child has it.
    """

    child: SessionId
    old: TurnContent
    new: TurnContent


async def rerun(
    runtime: Runtime,
    session: sessions.Session,
    number: int,
    model: str,
    me: leasing.Holder,
    answers: leasing.HolderAnswers,
    on_wait: Callable[[str], None],
) -> Rerun:
    """Fork the session at a turn, and ask another model.

    Raises:
        InvalidInput: `rerun_unreadable`, the request names no model.
        As `fork`.
    """
    session_id = session.session_id
    old = await runtime.database.read(lambda tx: read_turn(tx, session_id, number))
    other = with_model(old, model)
    forked = await fork(runtime, session, Wish(at=f"turn:{number}", asleep=True, other={old.call.call_id: other}), me)
    child, call_id = forked.children[0], forked.call_ids[0][old.call.call_id]
    async with runtime.borrow(child, me, answers) as records:
        await fetch_answer(
            call_id,
            database=runtime.database,
            session_id=child,
            owner_token=records.owner_token,
            clock=runtime.clock,
            upstreams=runtime.upstreams,
            prices=runtime.prices,
            on_wait=on_wait,
        )

    def read(tx: Transaction) -> TurnContent:
        return read_call(tx, call_id, number=number, turns=old.turns)

    return Rerun(child=child, old=old, new=await runtime.database.read(read))


def with_model(turn: TurnContent, model: str) -> OtherRequest:
    """The turn's request, to another model of the same kind.

    Raises:
        InvalidInput: `rerun_unreadable`.
    """
    call = turn.call
    target = call.target if turn.request_head is None else turn.request_head.target
    if call.dialect in _IN_BODY:
        body = _decoded(turn)
        if not isinstance(body.get("model"), str):
            raise _unreadable(turn, "it names no model")
        changed = json.dumps({**body, "model": model}, separators=(",", ":"))
        return OtherRequest(target=target, body=changed.encode(), model=model)
    before, separator, after = target.partition(f"/models/{call.model}")
    if call.model is None or not separator:
        raise _unreadable(turn, "it names no model where this dialect has it")
    return OtherRequest(target=f"{before}/models/{model}{after}", body=turn.request, model=model)


def _decoded(turn: TurnContent) -> dict[str, Any]:
    try:
        body = json.loads(turn.request)
    except ValueError as error:
        raise _unreadable(turn, "its body is compressed, or no JSON") from error
    if not isinstance(body, dict):
        raise _unreadable(turn, "its body is no JSON object")
    return body  # pyright: ignore[reportUnknownVariableType]


def _unreadable(turn: TurnContent, reason: str) -> InvalidInput:
    return InvalidInput("rerun_unreadable", f"cannot ask another model in turn {turn.number}: {reason}")
