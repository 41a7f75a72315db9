"""Turns as people read them: what each model call saw, what it answered, which tools that led to, and where time went.

A turn's number counts the session's model calls in the order in which they were intended, from 1. Everything is derived
from the log; a tool's result is found in the pieces that the next requests brought for the first time.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torpor.core.call import Call, CallState, ResponseHead
from torpor.core.errors import Damaged, NotFound
from torpor.core.events import Event, Kind
from torpor.core.ids import CallId, SessionId
from torpor.db import answers, blocks, calls, checkpoints, log, requests
from torpor.db.database import Transaction
from torpor.db.requests import BASES_TRIED, RequestHead
from torpor.gateway.request import Headers, RequestLine, decoded_body
from torpor.gateway.transcript import Answered, Asked, Part, read_answer, read_request

_OBJECTS_MAX = 256
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """A tool that an answer called; `result` is None while no later request had it."""

    name: str
    tool_id: str | None
    arguments: str
    result: str | None = None
    is_error: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One line of `torpor turns`.

    Attributes:
        thinking_ns: from the first sending to the end of the answer; None while it has none.
        frozen_ns: how long the agent stood still for checkpoints before the next turn.
        down_ns: how long it did not live before the next turn, dead or asleep: from the last event of a life until a
            sandbox was made again. One that outlived its node was never down.
        damage: what of its request or answer can't be read any more; its tools are then not all known.
    """

    number: int
    call: Call
    wall_ns: int
    thinking_ns: int | None
    frozen_ns: int
    down_ns: int
    finish_reason: str | None
    tools: tuple[ToolUse, ...]
    repeated: int
    error: str | None
    damage: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnContent:
    """One turn in full. `request` and `answer` are the bytes as they are logged; masks where `redacted`."""

    number: int
    turns: int
    call: Call
    request_head: RequestHead | None
    request: bytes
    answer_head: ResponseHead | None
    answer: bytes
    redacted: bool

    @property
    def asked(self) -> Asked:
        headers = () if self.request_head is None else self.request_head.headers
        return read_request(self.call.dialect, decoded(headers, self.request))

    @property
    def answered(self) -> Answered:
        headers = () if self.answer_head is None else self.answer_head.headers
        return read_answer(self.call.dialect, decoded(headers, self.answer))


def read_turn(tx: Transaction, session_id: SessionId, number: int) -> TurnContent:
    """Raises:
    NotFound: `turn_not_found`.
    Damaged: `request_damaged`, `block_damaged`, `answer_damaged`.
    """
    made = calls.list_llm(tx, session_id)
    if not 1 <= number <= len(made):
        raise NotFound(
            "turn_not_found",
            f"cannot find turn {number} of session {session_id}: it has {len(made)}",
            hint="`torpor turns SESSION` lists them.",
        )
    return read_call(tx, made[number - 1], number=number, turns=len(made))


def read_call(tx: Transaction, call_id: CallId, *, number: int, turns: int) -> TurnContent:
    """A model's call as the turn of that number.

    Raises:
        Damaged: as `read_turn`.
    """
    call = calls.load_call(tx, call_id)
    request = requests.read_request(tx, call.call_id)
    head, body, masked = read_response(tx, call)
    return TurnContent(
        number=number,
        turns=turns,
        call=call,
        request_head=request.head,
        request=request.body,
        answer_head=head,
        answer=body,
        redacted=request.redacted or masked,
    )


def read_response(tx: Transaction, call: Call) -> tuple[ResponseHead | None, bytes, bool]:
    """The last attempt's head and body, and whether a part of it was redacted."""
    if not call.attempts:
        return None, b"", False
    attempt = call.attempts[-1]
    chunks, masked = answers.load(tx, call.call_id, attempt.number)
    return attempt.head, b"".join(chunk.data for chunk in chunks), masked


def list_turns(tx: Transaction, session_id: SessionId) -> list[Turn]:
    """Every turn, oldest first."""
    found = [call for call in calls.load_calls(tx, session_id) if call.is_llm]
    events = log.events(tx, session_id)
    told = _told(events)
    starts = [call.intended_seq for call in found]
    points = checkpoints.list_intact(tx, session_id, branches=True)
    frozen = _by_turn(((point.seq, point.freeze_ns) for point in points), starts)
    down = _by_turn(_downtimes(events), starts)
    turns: list[Turn] = []
    for number, call in enumerate(found, 1):
        mine = told.get(call.call_id, [])
        ended = next((event for event in mine if event.seq == call.ended_seq), None)
        sent = next((event.wall_ns for event in mine if event.kind is Kind.CALL_SENT), None)
        data: Mapping[str, Any] = ended.data if ended is not None else {}
        tools, damage = _tools(tx, call)
        turn = Turn(
            number=number,
            call=call,
            wall_ns=mine[0].wall_ns if mine else 0,
            thinking_ns=ended.wall_ns - sent if ended is not None and sent is not None else None,
            frozen_ns=frozen.get(call.intended_seq, 0),
            down_ns=down.get(call.intended_seq, 0),
            finish_reason=data.get("finish_reason"),
            tools=tools,
            repeated=sum(event.kind is Kind.CALL_REPEATED for event in mine),
            error=data.get("error"),
            damage=damage,
        )
        turns.append(turn)
    return _with_results(tx, session_id, turns)


class FreshParts:
    """What each request of a session brought that the ones before it did not have; feed it calls in order."""

    def __init__(self, session_id: SessionId) -> None:
        self._session_id = session_id
        self._recent: deque[frozenset[bytes]] = deque(maxlen=BASES_TRIED)

    def of(self, tx: Transaction, call_id: CallId) -> bytes:
        """The new pieces of its body and the ends of what is new: mostly whole JSON objects, and rests of others.

        Raises:
            Damaged: `block_damaged`.
        """
        request = requests.find(tx, call_id)
        if request is None:
            return b""
        pieces = requests.pieces_of(requests.read_list(tx, self._session_id, request.manifest))
        known = frozenset[bytes]().union(*self._recent)
        self._recent.append(frozenset(pieces))
        fresh = [piece not in known for piece in pieces]
        # The end of a new message is often a piece that an older one ends with.
        wanted = [piece for at, piece in enumerate(pieces) if fresh[at] or (at and fresh[at - 1])]
        contents = blocks.read_many(tx, self._session_id, wanted)
        return b"".join(contents[piece].data for piece in wanted)


def decoded(headers: Headers, body: bytes) -> bytes:
    """A body without its content-encoding."""
    return decoded_body(RequestLine(method="", target="", http_version="1.1", headers=headers, continued=False), body)


def _told(events: Sequence[Event]) -> dict[CallId, list[Event]]:
    told: dict[CallId, list[Event]] = {}
    for event in events:
        if event.call_id is not None:
            told.setdefault(event.call_id, []).append(event)
    return told


def _by_turn(durations: Iterable[tuple[int, int]], starts: Sequence[int]) -> dict[int, int]:
    """Durations, each with its seq, summed up by the first seq of the turn that they are in."""
    summed: dict[int, int] = {}
    for seq, duration in durations:
        start = max((start for start in starts if start <= seq), default=None)
        if start is not None:
            summed[start] = summed.get(start, 0) + duration
    return summed


def _downtimes(events: Sequence[Event]) -> Iterator[tuple[int, int]]:
    """How long no sandbox lived: a seq of that time, and its length."""
    last: Event | None = None
    for event in events:
        chosen = event.kind is Kind.RECOVERY_CHOSEN and event.incarnation > 1
        if chosen and last is not None and event.data.get("mode") != "adopt":
            yield last.seq, max(0, event.wall_ns - last.wall_ns)
        if event.kind not in _AFTER_DEATH:
            last = event


_AFTER_DEATH = frozenset(
    {
        Kind.LEASE_ACQUIRED,
        Kind.SESSION_STATUS,
        Kind.INCARNATION_ENDED,
        Kind.INCARNATION_STARTED,
        Kind.RECOVERY_REJECTED,
        Kind.CALL_TORN,
        Kind.STREAM_RESET,
        Kind.SESSION_REDACTED,
    }
)
"""What is logged of a session between two lives of its sandbox."""


def _tools(tx: Transaction, call: Call) -> tuple[tuple[ToolUse, ...], str | None]:
    """The tools that an answer called; or what keeps it from being read."""
    if call.state is not CallState.ANSWERED:
        return (), None
    try:
        head, body, _ = read_response(tx, call)
    except Damaged as damaged:
        return (), str(damaged)
    answered = read_answer(call.dialect, decoded(() if head is None else head.headers, body))
    tools = [
        ToolUse(name=part.name or "?", tool_id=part.tool_id, arguments=part.text)
        for part in answered.message.parts
        if part.kind == "tool_call"
    ]
    return tuple(tools), None


def _with_results(tx: Transaction, session_id: SessionId, turns: list[Turn]) -> list[Turn]:
    """Join tools with the results that later requests brought; each result answers the oldest call of its id."""
    parts = FreshParts(session_id)
    waiting: dict[str, list[tuple[int, int]]] = {}
    tools = [list(turn.tools) for turn in turns]
    damages = [turn.damage for turn in turns]
    for at, turn in enumerate(turns):
        try:
            fresh = parts.of(tx, turn.call.call_id)
        except Damaged as damaged:
            fresh, damages[at] = b"", damages[at] or str(damaged)
        for result in tool_results(turn.call.dialect, fresh):
            asked = waiting.get(result.tool_id or "")
            if asked:
                index, position = asked.pop(0)
                tools[index][position] = replace(tools[index][position], result=result.text, is_error=result.is_error)
        for position, tool in enumerate(turn.tools):
            waiting.setdefault(tool.tool_id or "", []).append((at, position))
    return [replace(turn, tools=tuple(tools[at]), damage=damages[at]) for at, turn in enumerate(turns)]


def tool_results(dialect: str, fresh: bytes) -> Iterator[Part]:
    """The tool results in a piece of a request."""
    for value in objects(fresh):
        for shape in (value, {"role": "user", "content": [value]}, {"role": "user", "parts": [value]}):
            body = json.dumps({"messages": [shape], "input": [shape], "contents": [shape]}).encode()
            found = [
                part
                for message in read_request(dialect, body).messages
                for part in message.parts
                if part.kind == "tool_result"
            ]
            if found:
                yield from found
                break


def objects(text: bytes) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects that stand whole in a piece of JSON."""
    plain = text.decode(errors="replace")
    at = plain.find("{")
    for _ in range(_OBJECTS_MAX):
        if at < 0:
            return
        try:
            value, end = _DECODER.raw_decode(plain, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            yield value
        at = plain.find("{", end)
