"""Calls of one session in another, or once more in the same: what forks and rewinds need of them.

A copy is a call of its own, with an id of its own. Its call.intended says where it comes from:

    joins      (fork) the parent's call, and which attempt of it the agent may have seen a part of
    resamples  (rewind) the call that it stands for

An answer that is copied was paid for where it was given: it costs nothing here, and its token counts are not counted
again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torpor.core.call import Attempt, Call, CallState
from torpor.core.errors import Damaged
from torpor.core.events import Event, Kind
from torpor.core.ids import CallId, SessionId
from torpor.core.money import Bill
from torpor.db import answers, calls, log, requests
from torpor.db.call_rows import Chunk, NewCall
from torpor.db.database import Transaction
from torpor.db.requests import PreparedBody, RequestHead

_FREE = Bill(cost_nanousd=0, prices=None)
_FACTS = ("status", "finish_reason")
_CLAIMING = frozenset({Kind.CALL_INTENDED, Kind.CALL_REPEATED, Kind.CALL_JOINED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer, as one attempt has it; `facts` is what call.completed said of it for people."""

    attempt: Attempt
    chunks: Sequence[Chunk]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A call that is to be copied.

    Attributes:
        answer: None unless it is answered.
        redacted: a part of its request is only a mask, so it is never sent.
        form: how its stream gets the answer, as call.intended says it.
    """

    call: Call
    head: RequestHead
    body: bytes
    answer: Answer | None
    form: Mapping[str, Any]
    redacted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Joining:
    """A call of a fork that waits for its parent's answer.

    Attributes:
        attempt: the parent's attempt that the agent has seen a part of; None if it has seen nothing.
    """

    call_id: CallId
    parent_id: SessionId
    parent_call: CallId
    attempt: int | None


def read_source(tx: Transaction, call: Call, events: Sequence[Event], *, past_seq: int) -> Source:
    """Read a call with its request, and its answer if it has one.

    Args:
        events: of its session.
        past_seq: how its stream was to get the answer then.

    Raises:
        Damaged: `request_damaged`, `answer_damaged`, `block_damaged`.
    """
    request = requests.read_request(tx, call.call_id)
    if request.head is None:
        raise Damaged("request_damaged", f"cannot copy call {call.call_id}: the head of its request was redacted")
    form: dict[str, Any] = {}
    for event in events:
        if event.call_id == call.call_id and event.kind in _CLAIMING and event.seq <= max(past_seq, call.intended_seq):
            form = {name: event.data[name] for name in ("shape", "hide_usage") if name in event.data}
    return Source(
        call=call,
        head=request.head,
        body=request.body,
        answer=read_answer(tx, call),
        form=form,
        redacted=request.redacted,
    )


def read_answer(tx: Transaction, call: Call) -> Answer | None:
    """A call's answer; None while it has none.

    Raises:
        Damaged: `answer_damaged`.
    """
    if not call.answered:
        return None
    attempt = call.attempts[-1]
    [ended] = log.events(tx, call.session_id, after_seq=(call.ended_seq or 0) - 1, limit=1)
    facts = {name: ended.data[name] for name in _FACTS if name in ended.data}
    return Answer(attempt=attempt, chunks=answers.load(tx, call.call_id, attempt.number)[0], facts=facts)


def copy(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    source: Source,
    call_id: CallId,
    prepared: PreparedBody,
    origin: Mapping[str, Any],
    wall_ns: int,
) -> Call:
    """Intend the call once more, as a call of this session, under `call_id`; nothing of it is sent.

    Args:
        prepared: its body, or another one that is to be sent in its place.
    """
    old = source.call
    call = NewCall(
        call_id=call_id,
        key=old.key,
        dialect=old.dialect,
        method=old.method,
        target=source.head.target,
        model=origin.get("model", old.model),
        incarnation=old.incarnation,
        stream=old.stream,
        request_bytes=old.request_bytes,
        is_llm=old.is_llm,
    )
    made: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token, "wall_ns": wall_ns}
    return calls.intend(tx, **made, call=call, head=source.head, body=prepared, origin={**source.form, **origin})


def take_answer(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    call_id: CallId,
    answer: Answer,
    joined: CallId,
    wall_ns: int,
) -> None:
    """Give a copy the answer of the call that it joins, as its first attempt. Commit it durably."""
    head = answer.attempt.head
    assert head is not None, "an answered call has a head"
    step: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token, "call_id": call_id}
    number = calls.mark_sent(tx, **step, wall_ns=wall_ns, usage_asked=head.usage_asked).number
    calls.record_head(tx, **step, attempt=number, head=head, wall_ns=wall_ns)
    calls.append_chunks(tx, **step, attempt=number, chunks=answer.chunks)
    facts = {**answer.facts, "joined": joined}
    bill = _FREE if calls.load_call(tx, call_id).is_llm else None
    calls.complete(tx, **step, usage={}, facts=facts, bill=bill, wall_ns=wall_ns)


def list_joining(tx: Transaction, session_id: SessionId) -> list[Joining]:
    """The calls of a fork that have no answer yet, and may get that of the parent's call."""
    waiting = {call.call_id for call in calls.load_calls(tx, session_id) if _was_never_sent(call)}
    found: list[Joining] = []
    for event in log.events(tx, session_id) if waiting else ():
        joins = event.data.get("joins") if event.kind is Kind.CALL_INTENDED else None
        if joins is not None and event.call_id in waiting:
            parent = Joining(
                call_id=CallId(event.call_id or ""),
                parent_id=SessionId(joins["session"]),
                parent_call=CallId(joins["call"]),
                attempt=joins["attempt"],
            )
            found.append(parent)
    return found


def _was_never_sent(call: Call) -> bool:
    return call.state is CallState.INTENDED and not call.attempts
