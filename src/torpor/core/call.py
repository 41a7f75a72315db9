"""A call: one request through the gateway with its response, and the states it may pass through.

An attempt is one sending of a call upstream; a call has more than one only when its node died while the answer was
arriving. What an agent's socket receives is `response_bytes` of exactly one attempt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torpor.core.ids import CallId, SessionId, StreamId


class CallState(StrEnum):
    INTENDED = "intended"
    SENT = "sent"
    ANSWERED = "answered"
    TORN = "torn"
    FAILED = "failed"
    UNKNOWN = "unknown"


CALL_TRANSITIONS: Mapping[CallState, frozenset[CallState]] = {
    CallState.INTENDED: frozenset({CallState.SENT, CallState.FAILED}),
    CallState.SENT: frozenset({CallState.ANSWERED, CallState.TORN, CallState.FAILED, CallState.UNKNOWN}),
    CallState.TORN: frozenset({CallState.SENT, CallState.FAILED}),
    CallState.FAILED: frozenset(),
    CallState.UNKNOWN: frozenset({CallState.SENT, CallState.ANSWERED, CallState.FAILED}),
    CallState.ANSWERED: frozenset(),
}


SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""They change nothing outside."""

_COUNTING = ("/count_tokens", "/input_tokens", ":countTokens")
"""What a model would see is counted: a POST that changes nothing either."""


def only_reads(method: str, target: str) -> bool:
    """Whether a request changes nothing outside."""
    return method in SAFE_METHODS or target.partition("?")[0].endswith(_COUNTING)


def changes_outside(method: str, target: str) -> bool:
    """Whether a request that no model answers may have had an effect; what Torpor itself was asked has none."""
    return not only_reads(method, target) and target != "/mcp" and not target.startswith("/torpor/")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestKey:
    """What a request is matched by (SHA-256, hex): its exact bytes, its canonical form, and the logical call.

    `exact` is over method, target, the headers that matter and the decoded body; `canonical` over the same with the
    body's JSON in canonical form; `logical` leaves out what only shapes the answer (stream or not).
    """

    exact: str
    canonical: str
    logical: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHead:
    """The response head as it was first sent to the agent; `headers` in order, without hop-by-hop fields."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    continued: bool = False
    """The agent had asked for `100 Continue` and got it: those bytes stand before the head."""
    bodiless: bool = False
    """HEAD, 204, 304: no body follows."""
    chunked: bool = True
    """False for an HTTP/1.0 agent: the body ends where the connection does."""
    usage_asked: bool = False
    """The request as it was sent asked for token counts in the stream: a client that had not asked gets none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    number: int
    """Counts from 1."""
    sent_ns: int = 0
    """Wall time, for the prices of that day."""
    head: ResponseHead | None
    chunk_count: int
    body_bytes: int
    finished: bool
    """The upstream's answer ended properly and `call.completed` is durable."""
    reserved_nanousd: int | None = None
    """Its worst case, when it was sent under a budget."""
    cost_nanousd: int | None = None
    """None until it ended, and where nobody knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One row of the call table: the call's present state, derived from its events.

    Attributes:
        intended_seq: seq of its call.intended; parents hang on it.
        ended_seq: seq of call.completed or call.failed.
        incarnation, stream, request_bytes: where it first came from, and how many request bytes it took on that stream.
        dialect: "openai_chat", "anthropic", ...
        attempts: every sending so far, in order.
    """

    call_id: CallId
    session_id: SessionId
    state: CallState
    key: RequestKey
    dialect: str
    method: str
    target: str
    model: str | None
    incarnation: int
    stream: StreamId
    request_bytes: int
    intended_seq: int
    ended_seq: int | None
    attempts: tuple[Attempt, ...]
    usage: Mapping[str, Any]
    is_llm: bool = True
    barrier: bool = False
    """An effect that is held until a checkpoint holds its stream, and sent at most once (RECOVERY 7)."""

    @property
    def answered(self) -> bool:
        return self.state is CallState.ANSWERED

    @property
    def cost_nanousd(self) -> int | None:
        """What its attempts cost, as far as that is known; None where nothing is."""
        known = [attempt.cost_nanousd for attempt in self.attempts if attempt.cost_nanousd is not None]
        return sum(known) if known else None

    @property
    def may_be_sent_again(self) -> bool:
        """Whether a second sending is at worst a second bill: a model is asked again, and so is what is only read."""
        return not self.barrier and (self.is_llm or only_reads(self.method, self.target))


def state_without_pump(call: Call) -> CallState:
    """What a call is once the node that was receiving its answer died: torn, or unknown if it must not be repeated."""
    if call.state is not CallState.SENT:
        return call.state
    return CallState.TORN if call.may_be_sent_again else CallState.UNKNOWN


CRLF = b"\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


def head_bytes(head: ResponseHead) -> bytes:
    """The bytes on the agent's socket before the body: a pure function of the logged head, no clock."""
    lines = [f"HTTP/1.1 {head.status} {head.reason}".rstrip().encode("latin-1")]
    lines += [f"{name}: {value}".encode("latin-1") for name, value in head.headers]
    if not head.bodiless and head.chunked:
        lines.append(b"transfer-encoding: chunked")
    lines.append(b"connection: close")
    prefix = CONTINUE if head.continued else b""
    return prefix + CRLF.join(lines) + CRLF + CRLF


def chunk_bytes(head: ResponseHead, chunk: bytes) -> bytes:
    """One logged chunk as it stands on the agent's socket."""
    if head.bodiless or not chunk:
        return b""
    if not head.chunked:
        return chunk
    return f"{len(chunk):x}".encode() + CRLF + chunk + CRLF


def tail_bytes(head: ResponseHead) -> bytes:
    """The bytes that end an answered response."""
    return b"" if head.bodiless or not head.chunked else LAST_CHUNK


def response_bytes(head: ResponseHead, chunks: Sequence[bytes], *, finished: bool) -> bytes:
    """All bytes that an agent's socket receives for one attempt, as far as it is logged."""
    parts = [head_bytes(head), *(chunk_bytes(head, chunk) for chunk in chunks)]
    if finished:
        parts.append(tail_bytes(head))
    return b"".join(parts)
