"""Calls, their attempts and the chunks of their answers; every step writes its event in the same transaction.

A chunk is written before it is delivered, and only behind the answer that its call is receiving now: the statement
checks the owner token, the call's state, the attempt and the number. The digest in call.completed is taken of the
chunk rows themselves.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from torpor.core.call import CALL_TRANSITIONS, Attempt, Call, CallState, RequestKey, ResponseHead
from torpor.core.errors import Conflict, NotFound
from torpor.core.events import CONTEXT_KINDS, Event, EventDraft, Kind
from torpor.core.ids import CallId, SessionId, StreamId
from torpor.db import requests
from torpor.db.database import Row, Transaction
from torpor.db.encoding import decode_json, encode_json
from torpor.db.fence import held_row, refusal
from torpor.db.log import append
from torpor.db.requests import PreparedBody, RequestHead
from torpor.db.sessions import set_cursor


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCall:
    """What is known of a call before it is intended; the fields are those of `Call`."""

    call_id: CallId
    key: RequestKey
    dialect: str
    method: str
    target: str
    model: str | None
    incarnation: int
    stream: StreamId
    request_bytes: int
    is_llm: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a response body as it came from the upstream. `number` counts from 0, `offset_ns` from the sending."""

    number: int
    offset_ns: int
    data: bytes


def intend(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    call: NewCall,
    head: RequestHead,
    body: PreparedBody,
    wall_ns: int,
) -> Call:
    """Record that a call will be made, before anything of it leaves the host: call, request and call.intended.

    It hangs on the branch's cursor, which moves onto it. `body` is `requests.prepare(...)` of the request's body.
    """
    stored = requests.put_body(tx, session_id=session_id, owner_token=owner_token, body=body)
    draft = EventDraft(
        kind=Kind.CALL_INTENDED,
        incarnation=call.incarnation,
        call_id=call.call_id,
        parent_seq=held_row(tx, session_id, owner_token)["cursor_seq"],
        data={
            **_about(call),
            "stream": call.stream,
            "request_bytes": call.request_bytes,
            "key": asdict(call.key),
            "body": {"bytes": stored.body_bytes, "digest": stored.body_digest},
        },
        refs=(stored.manifest.hex(),),
    )
    seq = append(tx, session_id=session_id, owner_token=owner_token, drafts=[draft], wall_ns=wall_ns)[0].seq
    _insert_call(tx, session_id, owner_token, call, intended_seq=seq)
    set_cursor(tx, session_id=session_id, owner_token=owner_token, cursor_seq=seq)
    requests.put_request(
        tx, session_id=session_id, owner_token=owner_token, call_id=call.call_id, head=head, body=stored
    )
    return load_call(tx, call.call_id)


def mark_sent(tx: Transaction, *, session_id: SessionId, owner_token: int, call_id: CallId, wall_ns: int) -> Attempt:
    """Open the call's next attempt, before its first byte goes upstream. Commit it durably."""
    call = _call_to_move(tx, session_id, owner_token, call_id, CallState.SENT)
    number = len(call.attempts) + 1
    _open_attempt(tx, call, owner_token, number, wall_ns)
    _append(tx, owner_token, wall_ns, call, Kind.CALL_SENT, {"attempt": number})
    _set_state(tx, call, owner_token, CallState.SENT)
    return Attempt(number=number, head=None, chunk_count=0, body_bytes=0, finished=False)


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
    call = _held_call(tx, session_id, owner_token, call_id)
    _set_head(tx, call, owner_token, attempt, head)
    data = {"attempt": attempt, "status": head.status, "head_digest": head_digest(head)}
    _append(tx, owner_token, wall_ns, call, Kind.CALL_ANSWERING, data)


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
        _append_chunk(tx, session_id, owner_token, call_id, attempt, chunk, open_state=CallState.SENT)


def complete(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    call_id: CallId,
    usage: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    wall_ns: int,
) -> Event:
    """The answer that was arriving ended properly. Commit it durably: only then is the call answered.

    Args:
        usage: what the answer says that it cost, kept with the call.
        facts: more for people (finish reason, upstream request id), kept in the event only.
    """
    call = _call_to_move(tx, session_id, owner_token, call_id, CallState.ANSWERED)
    body = _close_attempt(tx, call, owner_token, finished=True)
    data = {**(facts or {}), **body, "usage": dict(usage)}
    event = _append(tx, owner_token, wall_ns, call, Kind.CALL_COMPLETED, data, refs=(body["digest"],))
    _set_state(tx, call, owner_token, CallState.ANSWERED, ended_seq=event.seq, usage=usage)
    return event


def fail(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    call_id: CallId,
    error: str,
    response: tuple[ResponseHead, bytes] | None = None,
    wall_ns: int,
) -> Event:
    """The call will have no answer. `response` is what the gateway says instead: a finished attempt of its own."""
    call = _call_to_move(tx, session_id, owner_token, call_id, CallState.FAILED)
    if call.state is CallState.SENT:
        _close_attempt(tx, call, owner_token, finished=False)
    data = {} if response is None else _record_response(tx, call, owner_token, *response, wall_ns=wall_ns)
    event = _append(tx, owner_token, wall_ns, call, Kind.CALL_FAILED, {**data, "error": error})
    _set_state(tx, call, owner_token, CallState.FAILED, ended_seq=event.seq)
    return event


def tear(tx: Transaction, *, session_id: SessionId, owner_token: int, call_id: CallId, wall_ns: int) -> Event:
    """The pump of a sent call died: what came of its answer is kept as this attempt, and no more will come of it."""
    call = _call_to_move(tx, session_id, owner_token, call_id, CallState.TORN)
    body = _close_attempt(tx, call, owner_token, finished=False)
    event = _append(tx, owner_token, wall_ns, call, Kind.CALL_TORN, body)
    _set_state(tx, call, owner_token, CallState.TORN)
    return event


def tear_open(
    tx: Transaction, *, session_id: SessionId, owner_token: int, wall_ns: int, pumped: frozenset[CallId] = frozenset()
) -> list[CallId]:
    """At recovery: tear every sent call but those whose pump still runs here."""
    held_row(tx, session_id, owner_token)
    rows = tx.all("call/list_in_state", session_id=session_id, state=CallState.SENT.value)
    torn = [CallId(row["call_id"]) for row in rows if row["call_id"] not in pumped]
    for call_id in torn:
        tear(tx, session_id=session_id, owner_token=owner_token, call_id=call_id, wall_ns=wall_ns)
    return torn


def doubt(tx: Transaction, *, session_id: SessionId, owner_token: int, call_id: CallId) -> None:
    """Nobody knows what came of a sent effect: it waits for a person's decision (RECOVERY 7)."""
    call = _call_to_move(tx, session_id, owner_token, call_id, CallState.UNKNOWN)
    _close_attempt(tx, call, owner_token, finished=False)
    _set_state(tx, call, owner_token, CallState.UNKNOWN)


def load_call(tx: Transaction, call_id: CallId) -> Call:
    """One call with its attempts.

    Raises:
        NotFound: there is none.
    """
    row = tx.one("call/find_by_id", call_id=call_id)
    if row is None:
        raise NotFound("call_not_found", f"cannot find call {call_id}: there is none")
    return _call_of(row, tx.all("call/list_attempts_of_call", call_id=call_id))


def load_calls(tx: Transaction, session_id: SessionId) -> list[Call]:
    """Every call of a session, in the order in which they were intended."""
    attempts = tx.all("call/list_attempts_of_session", session_id=session_id)
    by_call = {call_id: list(rows) for call_id, rows in groupby(attempts, key=lambda row: row["call_id"])}
    rows = tx.all("call/list_of_session", session_id=session_id)
    return [_call_of(row, by_call.get(row["call_id"], [])) for row in rows]


def load_chunks(tx: Transaction, call_id: CallId, attempt: int, *, from_number: int = 0) -> list[Chunk]:
    """The chunks of one attempt, in order, as far as they are written."""
    rows = tx.all("call/list_chunks", call_id=call_id, attempt=attempt, from_number=from_number)
    return [Chunk(number=row["number"], offset_ns=row["offset_ns"], data=bytes(row["data"])) for row in rows]


def head_digest(head: ResponseHead) -> str:
    """SHA-256 (hex) of a response head, by which the log covers it."""
    return hashlib.sha256(_head_text(head).encode()).hexdigest()


def body_facts(chunks: Sequence[bytes]) -> dict[str, Any]:
    """What the log says of a response body: bytes, chunks, and the SHA-256 (hex) over all of them."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return {"bytes": sum(map(len, chunks)), "chunks": len(chunks), "digest": digest.hexdigest()}


def _insert_call(tx: Transaction, session_id: SessionId, owner_token: int, call: NewCall, *, intended_seq: int) -> None:
    if not tx.run(
        "call/insert_fenced",
        session_id=session_id,
        owner_token=owner_token,
        call_id=call.call_id,
        state=CallState.INTENDED.value,
        key_exact=call.key.exact,
        key_canonical=call.key.canonical,
        key_logical=call.key.logical,
        about=encode_json(_about(call)),
        incarnation=call.incarnation,
        stream=call.stream,
        request_bytes=call.request_bytes,
        intended_seq=intended_seq,
    ):
        raise refusal(tx, session_id, owner_token, _changed(call.call_id))


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


def _set_state(
    tx: Transaction,
    call: Call,
    owner_token: int,
    state: CallState,
    *,
    ended_seq: int | None = None,
    usage: Mapping[str, Any] | None = None,
) -> None:
    if not tx.run(
        "call/set_state_fenced",
        session_id=call.session_id,
        owner_token=owner_token,
        call_id=call.call_id,
        seen_state=call.state.value,
        state=state.value,
        ended_seq=ended_seq,
        usage=None if usage is None else encode_json(dict(usage)),
    ):
        raise refusal(tx, call.session_id, owner_token, _changed(call.call_id))


def _open_attempt(tx: Transaction, call: Call, owner_token: int, number: int, wall_ns: int) -> None:
    if not tx.run(
        "call/insert_attempt_fenced",
        session_id=call.session_id,
        owner_token=owner_token,
        call_id=call.call_id,
        number=number,
        sent_ns=wall_ns,
    ):
        raise refusal(tx, call.session_id, owner_token, _changed(call.call_id))


def _set_head(tx: Transaction, call: Call, owner_token: int, attempt: int, head: ResponseHead) -> None:
    if not tx.run(
        "call/set_head_fenced",
        session_id=call.session_id,
        owner_token=owner_token,
        call_id=call.call_id,
        number=attempt,
        head=_head_text(head),
    ):
        otherwise = Conflict(
            "head_refused", f"cannot record a head of call {call.call_id}: attempt {attempt} does not wait for one"
        )
        raise refusal(tx, call.session_id, owner_token, otherwise)


def _append_chunk(
    tx: Transaction,
    session_id: SessionId,
    owner_token: int,
    call_id: CallId,
    attempt: int,
    chunk: Chunk,
    *,
    open_state: CallState,
) -> None:
    if not tx.run(
        "call/append_chunk_fenced",
        session_id=session_id,
        owner_token=owner_token,
        call_id=call_id,
        open_state=open_state.value,
        attempt=attempt,
        number=chunk.number,
        offset_ns=chunk.offset_ns,
        data=chunk.data,
    ):
        otherwise = Conflict(
            "chunk_refused",
            f"cannot add chunk {chunk.number} to call {call_id}: attempt {attempt} is not receiving it",
        )
        raise refusal(tx, session_id, owner_token, otherwise)


def _close_attempt(tx: Transaction, call: Call, owner_token: int, *, finished: bool) -> dict[str, Any]:
    """Let no more chunks into the newest attempt, and say what came of it."""
    attempt = call.attempts[-1]
    if finished and attempt.head is None:
        raise Conflict("call_without_head", f"cannot complete call {call.call_id}: its answer has no head")
    body = body_facts([chunk.data for chunk in load_chunks(tx, call.call_id, attempt.number)])
    if not tx.run(
        "call/close_attempt_fenced",
        session_id=call.session_id,
        owner_token=owner_token,
        call_id=call.call_id,
        number=attempt.number,
        chunk_count=body["chunks"],
        body_bytes=body["bytes"],
        finished=int(finished),
    ):
        raise refusal(tx, call.session_id, owner_token, _changed(call.call_id))
    return {"attempt": attempt.number, **body}


def _record_response(
    tx: Transaction, call: Call, owner_token: int, head: ResponseHead, body: bytes, *, wall_ns: int
) -> dict[str, Any]:
    """Add a whole response as one finished attempt."""
    number = len(call.attempts) + 1
    _open_attempt(tx, call, owner_token, number, wall_ns)
    _set_head(tx, call, owner_token, number, head)
    if body:
        chunk = Chunk(number=0, offset_ns=0, data=body)
        _append_chunk(tx, call.session_id, owner_token, call.call_id, number, chunk, open_state=call.state)
    answering = replace(call, attempts=load_call(tx, call.call_id).attempts)
    return {**_close_attempt(tx, answering, owner_token, finished=True), "head_digest": head_digest(head)}


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
    draft = EventDraft(
        kind=kind,
        incarnation=held_row(tx, call.session_id, owner_token)["incarnation"],
        call_id=call.call_id,
        parent_seq=call.intended_seq if kind in CONTEXT_KINDS else None,
        data=data,
        refs=refs,
    )
    return append(tx, session_id=call.session_id, owner_token=owner_token, drafts=[draft], wall_ns=wall_ns)[0]


def _about(call: NewCall) -> dict[str, Any]:
    """What is kept as JSON, since it may hold any string an agent sends."""
    return {
        "dialect": call.dialect,
        "method": call.method,
        "target": call.target,
        "model": call.model,
        "is_llm": call.is_llm,
    }


def _call_of(row: Row, attempts: Iterable[Row]) -> Call:
    return Call(
        call_id=CallId(row["call_id"]),
        session_id=SessionId(row["session_id"]),
        state=CallState(row["state"]),
        key=RequestKey(exact=row["key_exact"], canonical=row["key_canonical"], logical=row["key_logical"]),
        **decode_json(row["about"]),
        incarnation=row["incarnation"],
        stream=StreamId(row["stream"]),
        request_bytes=row["request_bytes"],
        intended_seq=row["intended_seq"],
        ended_seq=row["ended_seq"],
        attempts=tuple(map(_attempt_of, attempts)),
        usage=decode_json(row["usage"]),
    )


def _attempt_of(row: Row) -> Attempt:
    return Attempt(
        number=row["number"],
        head=None if row["head"] is None else _head_of(row["head"]),
        chunk_count=row["chunk_count"],
        body_bytes=row["body_bytes"],
        finished=bool(row["finished"]),
    )


def _head_text(head: ResponseHead) -> str:
    return encode_json(asdict(head))


def _head_of(text: str) -> ResponseHead:
    fields: dict[str, Any] = decode_json(text)
    headers = tuple((name, value) for name, value in fields.pop("headers"))
    return ResponseHead(headers=headers, **fields)


def _changed(call_id: CallId) -> Conflict:
    return Conflict("call_changed", f"cannot write call {call_id}: it changed meanwhile")
