"""Calls, their attempts and the chunks of their answers; every step writes its event in the same transaction.

A chunk is written before it is delivered, and only behind the answer that its call is receiving now: the statement
checks the owner token, the call's state, the attempt and the number. The digest in call.completed is taken of the
chunk rows themselves.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from torpor.core.call import CALL_TRANSITIONS, Attempt, Call, CallState, ResponseHead
from torpor.core.checkpoint import Checkpoint, OpenStream
from torpor.core.errors import Conflict, NotFound
from torpor.core.events import CONTEXT_KINDS, Event, EventDraft, Kind
from torpor.core.ids import CallId, SessionId
from torpor.core.money import Bill, dollars_text
from torpor.db import answers, requests
from torpor.db.answers import Packed
from torpor.db.blobs import BLOB_BYTES_MIN
from torpor.db.call_rows import (
    Chunk,
    NewCall,
    append_chunk,
    call_of,
    close_attempt,
    insert_call,
    intended_call,
    intent_data,
    open_attempt,
    set_head,
    set_state,
)
from torpor.db.database import Row, Transaction
from torpor.db.encoding import decode_json
from torpor.db.fence import held_row
from torpor.db.log import append, hold
from torpor.db.requests import PreparedBody, RequestHead
from torpor.db.sessions import set_cursor


def intend(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    call: NewCall,
    head: RequestHead,
    body: PreparedBody,
    wall_ns: int,
    at_once: bool = False,
    usage_asked: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> Call:
    """Record that a call will be made, before anything of it leaves the host: call, request and call.intended.

    It hangs on the branch's cursor, which moves onto it. `body` is `requests.prepare(...)` of the request's body.

    Args:
        at_once: its first attempt is opened as well, as by `mark_sent`, unless a budget has to be asked.
        origin: what call.intended says more of a call that was not made here (db/copies.py).
    """
    request = requests.store(tx, session_id=session_id, owner_token=owner_token, head=head, body=body)
    log_head = hold(tx, session_id=session_id, owner_token=owner_token, wall_ns=wall_ns)
    at_once = at_once and not (call.is_llm and log_head.has_budget)
    intended = EventDraft(
        kind=Kind.CALL_INTENDED,
        incarnation=call.incarnation,
        call_id=call.call_id,
        parent_seq=log_head.cursor_seq,
        data={
            **intent_data(call),
            "request": request.facts,
            **({"hide_usage": True} if call.hide_usage else {}),
            **(origin or {}),
        },
        refs=(request.manifest.hex(),),
    )
    drafts = [intended]
    if at_once:
        data = _sent_data(1, usage_asked=usage_asked)
        incarnation = log_head.incarnation
        drafts.append(EventDraft(kind=Kind.CALL_SENT, incarnation=incarnation, call_id=call.call_id, data=data))
    written = append(tx, session_id=session_id, owner_token=owner_token, drafts=drafts, wall_ns=wall_ns, head=log_head)
    seq = written[0].seq
    insert_call(tx, session_id, owner_token, call, intended_seq=seq)
    set_cursor(tx, session_id=session_id, owner_token=owner_token, cursor_seq=seq)
    requests.attach(tx, session_id=session_id, owner_token=owner_token, call_id=call.call_id, request=request)
    made = intended_call(session_id, call, intended_seq=seq)
    return _with_attempt(tx, made, owner_token, wall_ns) if at_once else made


def _with_attempt(tx: Transaction, call: Call, owner_token: int, wall_ns: int) -> Call:
    """A call of which nothing was sent yet, with its first attempt."""
    open_attempt(tx, call, owner_token, 1, wall_ns)
    set_state(tx, call, owner_token, CallState.SENT)
    attempt = Attempt(number=1, sent_ns=wall_ns, head=None, chunk_count=0, body_bytes=0, finished=False)
    return replace(call, state=CallState.SENT, attempts=(attempt,))


def mark_sent(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    call_id: CallId,
    wall_ns: int,
    reserved_nanousd: int | None = None,
    usage_asked: bool = False,
) -> Attempt:
    """Open the call's next attempt, before its first byte goes upstream. Commit it durably.

    Args:
        reserved_nanousd: what it may cost at most, if `budgets.admit` was asked in this transaction.
        usage_asked: what is sent asks for token counts, and the logged request does not.
    """
    call = _call_to_move(tx, session_id, owner_token, call_id, CallState.SENT)
    number = len(call.attempts) + 1
    open_attempt(tx, call, owner_token, number, wall_ns, reserved_nanousd)
    data = _sent_data(number, reserved_nanousd=reserved_nanousd, usage_asked=usage_asked)
    _append(tx, owner_token, wall_ns, call, Kind.CALL_SENT, data)
    set_state(tx, call, owner_token, CallState.SENT)
    return Attempt(number=number, head=None, chunk_count=0, body_bytes=0, finished=False)


def _sent_data(number: int, *, reserved_nanousd: int | None = None, usage_asked: bool = False) -> dict[str, Any]:
    reserved = {} if reserved_nanousd is None else {"reserved": dollars_text(reserved_nanousd)}
    return {"attempt": number, **reserved, **({"usage_asked": True} if usage_asked else {})}


def note_retry(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    call_id: CallId,
    facts: Mapping[str, Any],
    wall_ns: int,
) -> Event:
    """The provider refused what was sent, and the same attempt is sent again: no row of the call changes."""
    call = _held_call(tx, session_id, owner_token, call_id)
    return _append(tx, owner_token, wall_ns, call, Kind.CALL_RETRIED, {"attempt": len(call.attempts), **facts})


def record_head(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    call_id: CallId,
    attempt: int,
    head: ResponseHead,
    wall_ns: int,
) -> None:
    """Record the response head as the agent will see it; from here on the call has happened.

    Raises:
        Conflict: `head_refused`, the call is not receiving this attempt, or it has a head.
    """
    digest = set_head(tx, session_id, owner_token, call_id, attempt, head)
    data = {"attempt": attempt, "status": head.status, "head_digest": digest}
    log_head = hold(tx, session_id=session_id, owner_token=owner_token, wall_ns=wall_ns)
    draft = EventDraft(kind=Kind.CALL_ANSWERING, incarnation=log_head.incarnation, call_id=call_id, data=data)
    append(tx, session_id=session_id, owner_token=owner_token, drafts=[draft], wall_ns=wall_ns, head=log_head)


def append_chunks(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    call_id: CallId,
    attempt: int,
    chunks: Iterable[Chunk],
) -> None:
    """Add the next chunks to the answer that is arriving.

    Raises:
        Conflict: `chunk_refused`, the call is not receiving this attempt, or the number is not the next one.
    """
    for chunk in chunks:
        append_chunk(tx, session_id, owner_token, call_id, attempt, chunk, open_state=CallState.SENT)


def complete(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    call_id: CallId,
    usage: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    bill: Bill | None = None,
    packed: Packed | None = None,
    wall_ns: int,
) -> Event:
    """The answer that was arriving ended properly. Commit it durably: only then is the call answered.

    Args:
        packed: the answer, if it was packed ahead of this transaction.
        usage: what the answer says that it cost, kept with the call.
        facts: more for people (finish reason, upstream request id), kept in the event only.
        bill: what it cost; None for what is never billed.
    """
    call = _call_to_move(tx, session_id, owner_token, call_id, CallState.ANSWERED)
    if call.attempts[-1].head is None:
        raise Conflict("call_without_head", f"cannot complete call {call_id}: its answer has no head")
    body = _close_newest(tx, call, owner_token, finished=True, bill=bill, packed=packed)
    data = {**(facts or {}), **body, "usage": dict(usage), **bill_data(bill)}
    event = _append(tx, owner_token, wall_ns, call, Kind.CALL_COMPLETED, data, refs=(body["digest"],))
    set_state(tx, call, owner_token, CallState.ANSWERED, ended_seq=event.seq, usage=usage)
    return event


def fail(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    call_id: CallId,
    error: str,
    response: tuple[ResponseHead, bytes] | None = None,
    bill: Bill | None = None,
    packed: Packed | None = None,
    wall_ns: int,
) -> Event:
    """The call will have no answer. `response` is what the gateway says instead: a finished attempt of its own.

    `bill` is what the attempt that got none cost all the same.
    """
    call = _call_to_move(tx, session_id, owner_token, call_id, CallState.FAILED)
    if call.state is CallState.SENT:
        _close_newest(tx, call, owner_token, finished=False, bill=bill, packed=packed)
    data = {} if response is None else _record_response(tx, call, owner_token, *response, wall_ns=wall_ns)
    event = _append(tx, owner_token, wall_ns, call, Kind.CALL_FAILED, {**data, "error": error, **bill_data(bill)})
    set_state(tx, call, owner_token, CallState.FAILED, ended_seq=event.seq)
    return event


def tear(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    call_id: CallId,
    wall_ns: int,
    bill: Bill | None = None,
    packed: Packed | None = None,
) -> Event:
    """The pump of a sent call died: what came of its answer is kept as this attempt, and no more will come of it."""
    call = _call_to_move(tx, session_id, owner_token, call_id, CallState.TORN)
    body = _close_newest(tx, call, owner_token, finished=False, bill=bill, packed=packed)
    event = _append(tx, owner_token, wall_ns, call, Kind.CALL_TORN, {**body, **bill_data(bill)})
    set_state(tx, call, owner_token, CallState.TORN)
    return event


def tear_open(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    wall_ns: int,
    pumped: frozenset[CallId] = frozenset(),
    bills: Mapping[CallId, Bill] | None = None,
    packed: Mapping[CallId, Packed] | None = None,
) -> list[CallId]:
    """At recovery: tear every sent call but those whose pump still runs here. `bills` is what came of some.

    Args:
        packed: the answers that were packed ahead of this transaction, as far as they got.
    """
    held_row(tx, session_id, owner_token)
    rows = tx.all("call/list_in_state", session_id=session_id, state=CallState.SENT.value)
    torn = [CallId(row["call_id"]) for row in rows if row["call_id"] not in pumped]
    for call_id in torn:
        tear(
            tx,
            session_id=session_id,
            owner_token=owner_token,
            call_id=call_id,
            wall_ns=wall_ns,
            bill=(bills or {}).get(call_id),
            packed=(packed or {}).get(call_id),
        )
    return torn


def list_long_sent(tx: Transaction, session_id: SessionId) -> list[tuple[CallId, int]]:
    """The sent calls of which so much has arrived that it is packed ahead, each with the number of its attempt."""
    found: list[tuple[CallId, int]] = []
    for call in load_in_state(tx, session_id, CallState.SENT):
        number = call.attempts[-1].number
        measured = tx.one("call/measure_chunks", call_id=call.call_id, attempt=number)
        if measured is not None and measured["body_bytes"] >= BLOB_BYTES_MIN:
            found.append((call.call_id, number))
    return found


def doubt(tx: Transaction, *, session_id: SessionId, owner_token: int, call_id: CallId) -> None:
    """Nobody knows what came of a sent effect: it waits for a person's decision (RECOVERY 7)."""
    call = _call_to_move(tx, session_id, owner_token, call_id, CallState.UNKNOWN)
    _close_newest(tx, call, owner_token, finished=False)
    set_state(tx, call, owner_token, CallState.UNKNOWN)


def load_call(tx: Transaction, call_id: CallId) -> Call:
    """One call with its attempts.

    Raises:
        NotFound: there is none.
    """
    row = tx.one("call/find_by_id", call_id=call_id)
    if row is None:
        raise NotFound("call_not_found", f"cannot find call {call_id}: there is none")
    return _with_attempts(tx, row)


def load_calls(tx: Transaction, session_id: SessionId) -> list[Call]:
    """Every call of a session, in the order in which they were intended."""
    attempts = tx.all("call/list_attempts_of_session", session_id=session_id)
    by_call = {call_id: list(rows) for call_id, rows in groupby(attempts, key=lambda row: row["call_id"])}
    rows = tx.all("call/list_of_session", session_id=session_id)
    return [call_of(row, by_call.get(row["call_id"], [])) for row in rows]


def load_of_streams(tx: Transaction, session_id: SessionId, streams: Iterable[OpenStream]) -> list[Call]:
    """The session's calls that these streams carry."""
    return _load_named(tx, session_id, [stream.call_id for stream in streams if stream.call_id is not None])


def load_beyond(tx: Transaction, session_id: SessionId, checkpoint: Checkpoint) -> list[Call]:
    """The calls after a checkpoint, and those that it names: all that the redo set of a life from there is made of.

    A session of ten thousand turns wakes as quickly as one of ten.
    """
    after = [_with_attempts(tx, row) for row in tx.all("call/list_after", session_id=session_id, seq=checkpoint.seq)]
    named = _load_named(tx, session_id, [*checkpoint.pending_redo, *checkpoint.joinable])
    return [*load_of_streams(tx, session_id, checkpoint.open_streams), *named, *after]


def load_in_state(tx: Transaction, session_id: SessionId, state: CallState) -> list[Call]:
    """The calls of a session that are in a state, oldest first."""
    rows = tx.all("call/list_in_state", session_id=session_id, state=state.value)
    return [_with_attempts(tx, row) for row in rows]


def list_llm(tx: Transaction, session_id: SessionId) -> list[CallId]:
    """The ids of a session's model calls, in the order in which they were intended."""
    rows = tx.all("call/list_abouts", session_id=session_id)
    return [CallId(row["call_id"]) for row in rows if decode_json(row["about"])["is_llm"]]


def load_chunks(tx: Transaction, call_id: CallId, attempt: int, *, from_number: int = 0) -> list[Chunk]:
    """The chunks of one attempt, in order, as far as they are written; of redacted bytes, the mask."""
    return answers.load(tx, call_id, attempt)[0][from_number:]


def _load_named(tx: Transaction, session_id: SessionId, call_ids: Iterable[CallId]) -> list[Call]:
    rows = [tx.one("call/find_by_id", call_id=call_id) for call_id in dict.fromkeys(call_ids)]
    return [_with_attempts(tx, row) for row in rows if row is not None and row["session_id"] == session_id]


def _with_attempts(tx: Transaction, row: Row) -> Call:
    return call_of(row, tx.all("call/list_attempts_of_call", call_id=row["call_id"]))


def _held_call(tx: Transaction, session_id: SessionId, owner_token: int, call_id: CallId) -> Call:
    held_row(tx, session_id, owner_token)
    call = load_call(tx, call_id)
    if call.session_id != session_id:
        raise NotFound("call_not_found", f"cannot find call {call_id}: session {session_id} has none such")
    return call


def _call_to_move(tx: Transaction, session_id: SessionId, owner_token: int, call_id: CallId, state: CallState) -> Call:
    """The call as it is, which CALL_TRANSITIONS lets go to `state`."""
    call = _held_call(tx, session_id, owner_token, call_id)
    if state not in CALL_TRANSITIONS[call.state]:
        raise Conflict("call_transition_refused", f"cannot move call {call_id} to {state}: it is {call.state}")
    return call


def bill_data(bill: Bill | None) -> dict[str, Any]:
    """What an event says of a bill: the cost in dollars, as an exact decimal, and the table that it is by."""
    if bill is None:
        return {}
    cost = None if bill.cost_nanousd is None else dollars_text(bill.cost_nanousd)
    return {"cost": cost, "prices": bill.prices}


def _close_newest(
    tx: Transaction,
    call: Call,
    owner_token: int,
    *,
    finished: bool,
    bill: Bill | None = None,
    packed: Packed | None = None,
) -> dict[str, Any]:
    """Let no more chunks into the attempt that is arriving, and say what came of it."""
    number = call.attempts[-1].number
    if packed is None or (packed.call_id, packed.attempt) != (call.call_id, number) or not answers.is_still(tx, packed):
        packed = answers.pack(tx, call.call_id, number)
    close_attempt(
        tx,
        call,
        owner_token,
        number=number,
        body=packed.facts,
        finished=finished,
        cost_nanousd=bill.cost_nanousd if bill else None,
    )
    answers.store(tx, session_id=call.session_id, owner_token=owner_token, packed=packed)
    return {"attempt": number, **packed.facts}


def _record_response(
    tx: Transaction, call: Call, owner_token: int, head: ResponseHead, body: bytes, *, wall_ns: int
) -> dict[str, Any]:
    """Add a whole response as one finished attempt."""
    number = len(call.attempts) + 1
    open_attempt(tx, call, owner_token, number, wall_ns)
    digest = set_head(tx, call.session_id, owner_token, call.call_id, number, head)
    chunks = [Chunk(number=0, offset_ns=0, data=body)] if body else []
    for chunk in chunks:
        append_chunk(tx, call.session_id, owner_token, call.call_id, number, chunk, open_state=call.state)
    packed = answers.pack(tx, call.call_id, number)
    close_attempt(tx, call, owner_token, number=number, body=packed.facts, finished=True)
    answers.store(tx, session_id=call.session_id, owner_token=owner_token, packed=packed)
    return {"attempt": number, **packed.facts, "head_digest": digest}


def _append(
    tx: Transaction,
    owner_token: int,
    wall_ns: int,
    call: Call,
    kind: Kind,
    data: Mapping[str, Any],
    refs: Sequence[str] = (),
) -> Event:
    """Add one of the call's events; its ends hang on its call.intended."""
    fence: dict[str, Any] = {"session_id": call.session_id, "owner_token": owner_token}
    head = hold(tx, **fence, wall_ns=wall_ns)
    draft = EventDraft(
        kind=kind,
        incarnation=head.incarnation,
        call_id=call.call_id,
        parent_seq=call.intended_seq if kind in CONTEXT_KINDS else None,
        data=data,
        refs=refs,
    )
    return append(tx, **fence, drafts=[draft], wall_ns=wall_ns, head=head)[0]
