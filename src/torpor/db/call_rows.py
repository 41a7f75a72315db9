"""Rows of calls, attempts and chunks: their values, and the fenced statements that write one row each."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torpor.core.call import Attempt, Call, CallState, RequestKey, ResponseHead
from torpor.core.errors import Conflict
from torpor.core.ids import CallId, SessionId, StreamId
from torpor.db.database import Row, Transaction
from torpor.db.encoding import decode_json, encode_json
from torpor.db.fence import refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCall:
    """What is known of a call before it is intended; the fields are those of `Call`, but the last one.

    Attributes:
        hide_usage: its client did not ask for the token counts that a stream of this API has only if asked for.
    """

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
    hide_usage: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a response body as it came from the upstream. `number` counts from 0, `offset_ns` from the sending."""

    number: int
    offset_ns: int
    data: bytes


def head_digest(head: ResponseHead) -> str:
    """SHA-256 (hex) of a response head, by which the log covers it."""
    return _digest_of_head(head_text(head))


def _digest_of_head(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def body_facts(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """What the log says of a response body.

    `digest` is the SHA-256 (hex) of the body; `layout` is that of where its chunks end and when they came, since the
    bytes on the agent's socket go by the chunks.
    """
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk.data)
    layout = encode_json([[chunk.number, chunk.offset_ns, len(chunk.data)] for chunk in chunks])
    return {
        "bytes": sum(len(chunk.data) for chunk in chunks),
        "chunks": len(chunks),
        "digest": digest.hexdigest(),
        "layout": hashlib.sha256(layout.encode()).hexdigest(),
    }


def intent_data(call: NewCall | Call) -> dict[str, Any]:
    """What call.intended says of the call itself."""
    return {
        **_about(call),
        "stream": call.stream,
        "request_bytes": call.request_bytes,
        "key": asdict(call.key),
    }


def intended_call(session_id: SessionId, call: NewCall, *, intended_seq: int) -> Call:
    """A new call as its row has it."""
    return Call(
        call_id=call.call_id,
        session_id=session_id,
        state=CallState.INTENDED,
        key=call.key,
        **_about(call),
        incarnation=call.incarnation,
        stream=call.stream,
        request_bytes=call.request_bytes,
        intended_seq=intended_seq,
        ended_seq=None,
        attempts=(),
        usage={},
    )


def insert_call(tx: Transaction, session_id: SessionId, owner_token: int, call: NewCall, *, intended_seq: int) -> None:
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
        raise refusal(tx, session_id, owner_token, changed(call.call_id))


def set_state(
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
        raise refusal(tx, call.session_id, owner_token, changed(call.call_id))


def open_attempt(
    tx: Transaction, call: Call, owner_token: int, number: int, wall_ns: int, reserved: int | None = None
) -> None:
    if not tx.run(
        "call/insert_attempt_fenced",
        session_id=call.session_id,
        owner_token=owner_token,
        call_id=call.call_id,
        number=number,
        sent_ns=wall_ns,
        reserved_nanousd=reserved,
    ):
        raise refusal(tx, call.session_id, owner_token, changed(call.call_id))


def set_head(
    tx: Transaction, session_id: SessionId, owner_token: int, call_id: CallId, attempt: int, head: ResponseHead
) -> str:
    """Keep a head with its attempt; gives its `head_digest`."""
    text = head_text(head)
    if not tx.run(
        "call/set_head_fenced",
        session_id=session_id,
        owner_token=owner_token,
        call_id=call_id,
        number=attempt,
        head=text,
    ):
        otherwise = Conflict(
            "head_refused", f"cannot record a head of call {call_id}: attempt {attempt} does not wait for one"
        )
        raise refusal(tx, session_id, owner_token, otherwise)
    return _digest_of_head(text)


def append_chunk(
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


def close_attempt(
    tx: Transaction,
    call: Call,
    owner_token: int,
    *,
    number: int,
    body: Mapping[str, Any],
    finished: bool,
    cost_nanousd: int | None = None,
) -> None:
    """Let no more chunks in; `body` is `body_facts` of those that came."""
    if not tx.run(
        "call/close_attempt_fenced",
        session_id=call.session_id,
        owner_token=owner_token,
        call_id=call.call_id,
        number=number,
        chunk_count=body["chunks"],
        body_bytes=body["bytes"],
        finished=int(finished),
        cost_nanousd=cost_nanousd,
    ):
        raise refusal(tx, call.session_id, owner_token, changed(call.call_id))


def _about(call: NewCall | Call) -> dict[str, Any]:
    """What is kept as JSON, since it may hold any string an agent sends."""
    return {
        "dialect": call.dialect,
        "method": call.method,
        "target": call.target,
        "model": call.model,
        "is_llm": call.is_llm,
    }


def call_of(row: Row, attempts: Iterable[Row]) -> Call:
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
        sent_ns=row["sent_ns"],
        head=None if row["head"] is None else _head_of(row["head"]),
        chunk_count=row["chunk_count"],
        body_bytes=row["body_bytes"],
        finished=bool(row["finished"]),
        reserved_nanousd=row["reserved_nanousd"],
        cost_nanousd=row["cost_nanousd"],
    )


def head_text(head: ResponseHead) -> str:
    values = {name: getattr(head, name) for name in _HEAD_FIELDS}
    if not head.usage_asked:
        # Heads were written before there was such a field, and their digests stand in the log.
        del values["usage_asked"]
    return encode_json(values)


_HEAD_FIELDS = tuple(field.name for field in fields(ResponseHead))


def _head_of(text: str) -> ResponseHead:
    values: dict[str, Any] = decode_json(text)
    headers = tuple((name, value) for name, value in values.pop("headers"))
    return ResponseHead(headers=headers, **values)


def changed(call_id: CallId) -> Conflict:
    return Conflict("call_changed", f"cannot write call {call_id}: it changed meanwhile")
