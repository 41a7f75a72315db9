"""What an agent may wait for: a person's answer, a time, a message, any or all of several.

A wish that waits is a call that stays intended, and holds waitpoints, until what it waits for has come; only then is it
sent, so to speak, and answered in one transaction. It holds no memory of its own: whoever serves the call next (after a
restore, in another node) looks at the rows again. Order, and what a kill -9 leaves:

    call.intended                      as ever: its stream, or the agent's repeat, starts it again
    waitpoint, and the status `waiting` (`waitpoint.created`)
                                       the call finds its waitpoint by its own id
    somebody resolves it (`waitpoint.resolved`), or its time comes
                                       a resolution that nobody was told of: the call looks again when a node runs it
    sent, answer, completed: one transaction (`call.completed`)
                                       delivered from the log
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from torpor.core.ids import CallId, WaitpointId
from torpor.core.waitpoint import TIMED_OUT, Question, Waitpoint, WaitpointKind
from torpor.db import children, messages, questions, waitpoints
from torpor.db.database import Transaction
from torpor.gateway.agent_api import AskBody, ReceiveBody, Reply, SleepBody, WaitBody, Wish
from torpor.gateway.record import Recorder
from torpor.sandbox.fifos import Pulse

LOOK_SECONDS_MAX = 30
"""The wall clock may be set, and stands still for no suspended machine: so long is trusted to a monotonic timer."""

CHILD_LOOK_SECONDS = 1.0
"""A child ends in another process, which may die before it could tell."""

OnWait = Callable[[str], None]


class Waits:
    """What one session's calls wait for on this node.

    Args:
        on_wait: told, in words, what a person has to do.
    """

    def __init__(self, recorder: Recorder, on_wait: OnWait) -> None:
        self._recorder = recorder
        self._on_wait = on_wait
        self._changes = 0
        self._changed = Pulse()
        self._due_ns: dict[CallId, int | None] = {}

    def due_ns(self, call_ids: Collection[CallId]) -> int | None:
        """The wall time at which the first of these calls is answered whatever else happens; None: there is none."""
        return min((due for call_id in call_ids if (due := self._due_ns.get(call_id)) is not None), default=None)

    def look_again(self) -> None:
        """Something was resolved, or the clock was set."""
        self._changes += 1
        self._changed.fire()

    async def until_ready(self, call_id: CallId, wish: Wish) -> None:
        """Wait until a wish can be answered.

        Raises:
            Superseded: this node lost the session.
        """
        told = False
        while True:
            seen = self._changes
            waiting = await self._recorder.hold(lambda tx: self._prepare(tx, call_id, wish))
            if not waiting:
                return
            if isinstance(wish.body, AskBody) and not told:
                told = True
                self._on_wait(_told(wish.body))
            due = self._due_ns[call_id] = min(
                (at for point in waiting if (at := point.due_ns) is not None), default=None
            )
            kin = [point for point in waiting if point.kind is WaitpointKind.CHILD]
            try:
                await (self._change_or_end(seen, due, kin) if kin else self._change(seen, due))
            finally:
                del self._due_ns[call_id]

    async def _change_or_end(self, seen: int, due_ns: int | None, kin: Sequence[Waitpoint]) -> None:
        """As `_change`, or until a child has ended."""
        while self._changes == seen and (due_ns is None or due_ns > self._recorder.wall_ns()):
            with suppress(TimeoutError):
                async with asyncio.timeout(CHILD_LOOK_SECONDS):
                    await self._change(seen, due_ns)
            if await self._recorder.read(lambda tx, _: any(children.has_ended(tx, point) for point in kin)):
                return

    async def _change(self, seen: int, due_ns: int | None) -> None:
        while self._changes == seen:
            if due_ns is None:
                await self._changed.wait()
                continue
            seconds = (due_ns - self._recorder.wall_ns()) / 1e9
            if seconds <= 0:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(min(seconds, LOOK_SECONDS_MAX)):
                    await self._changed.wait()

    def _prepare(self, tx: Transaction, call_id: CallId, wish: Wish) -> list[Waitpoint]:
        """What the call still waits on; nothing: it can be answered now."""
        fence, wall_ns = self._recorder.fence, self._recorder.wall_ns()
        session_id = fence["session_id"]
        made = waitpoints.list_of_call(tx, session_id, call_id)
        body = wish.body
        if not made:
            made = _make(tx, fence, call_id, wish, wall_ns)
        if isinstance(body, (AskBody, SleepBody)) and not body.wait:
            return []
        if isinstance(body, WaitBody):
            wanted = [waitpoints.find(tx, session_id, WaitpointId(name)) for name in body.waitpoints]
            found = [
                children.settle(tx, **fence, point=point, wall_ns=wall_ns) for point in wanted if point is not None
            ]
            ended = [point for point in found if not _is_waiting(point, wall_ns)]
            if len(found) < len(wanted) or len(ended) == len(found) or (ended and body.mode == "any"):
                return []
            if any(not _is_waiting(point, wall_ns) for point in made):
                return []
            waiting = [*made, *(point for point in found if point not in ended)]
        else:
            waiting = [point for point in made if _is_waiting(point, wall_ns)]
        if waiting:
            waitpoints.wait(tx, **fence, kind=waiting[0].kind, wall_ns=wall_ns)
        return waiting

    def reply(self, tx: Transaction, call_id: CallId, wish: Wish) -> Reply:
        """The answer, in the transaction that records it: what came to its time is resolved with it."""
        fence, wall_ns = self._recorder.fence, self._recorder.wall_ns()
        session_id = fence["session_id"]
        made = [_settled(tx, fence, point, wall_ns) for point in waitpoints.list_of_call(tx, session_id, call_id)]
        match wish.body:
            case ReceiveBody():
                return Reply(status=200, body=_message(tx, fence, call_id))
            case WaitBody() as body:
                return _waited(tx, fence, body, wall_ns)
            case _:
                return Reply(status=200, body=_outcome(tx, made[0]))


def _told(asked: AskBody) -> str:
    choices = f" ({', '.join(asked.choices)})" if asked.choices else ""
    files = f"; see {', '.join(asked.files)}" if asked.files else ""
    return f"the agent asks: {asked.question}{choices}{files}"


def _make(tx: Transaction, fence: Any, call_id: CallId, wish: Wish, wall_ns: int) -> list[Waitpoint]:
    """The call's own waitpoint; none if it needs none."""
    body = wish.body
    make: dict[str, Any] = {**fence, "call_id": call_id, "wall_ns": wall_ns}
    match body:
        case AskBody():
            offered: dict[str, Any] = {
                "choices": tuple(body.choices),
                "free_text": body.free_text,
                "files": tuple(body.files),
            }
            question = Question(text=body.question, **offered)
            return [questions.ask(tx, **make, question=question, due_ns=_due(body.timeout_seconds, wall_ns))]
        case SleepBody():
            until_ns = 0 if body.until is None else round(body.until.timestamp() * 1e9)
            due = max(wall_ns + round(body.seconds * 1e9), until_ns)
            return [waitpoints.create(tx, **make, kind=WaitpointKind.TIMER, due_ns=due)]
        case ReceiveBody() if messages.take(tx, **fence, call_id=call_id) is None and body.timeout_seconds != 0:
            due = _due(body.timeout_seconds, wall_ns)
            return [waitpoints.create(tx, **make, kind=WaitpointKind.MESSAGE, due_ns=due)]
        case WaitBody() if body.timeout_seconds is not None:
            due = _due(body.timeout_seconds, wall_ns)
            return [waitpoints.create(tx, **make, kind=WaitpointKind.TIMER, due_ns=due)]
        case _:
            return []


def _due(seconds: float | None, wall_ns: int) -> int | None:
    return None if seconds is None else wall_ns + round(seconds * 1e9)


def _is_waiting(point: Waitpoint, wall_ns: int) -> bool:
    return point.is_open and not (point.due_ns is not None and point.due_ns <= wall_ns)


def _settled(tx: Transaction, fence: Any, point: Waitpoint, wall_ns: int) -> Waitpoint:
    """The waitpoint as it is now: resolved, if its time has come."""
    if point.is_open and not _is_waiting(point, wall_ns):
        waitpoints.resolve(tx, **fence, point=point, resolution=TIMED_OUT, wall_ns=wall_ns)
        return waitpoints.find(tx, point.session_id, point.waitpoint_id) or point
    return point


def _waited(tx: Transaction, fence: Any, body: WaitBody, wall_ns: int) -> Reply:
    found: list[Waitpoint] = []
    for name in body.waitpoints:
        point = waitpoints.find(tx, fence["session_id"], WaitpointId(name))
        if point is None:
            message = f"cannot wait for {name[:200]!r}: this session has no such waitpoint"
            hint = "`ask` and `sleep` give the ids of theirs."
            return Reply(status=404, body={"code": "waitpoint_unknown", "message": message, "hint": hint})
        found.append(_settled(tx, fence, children.settle(tx, **fence, point=point, wall_ns=wall_ns), wall_ns))
    ended = [point for point in found if not point.is_open]
    done = bool(ended) if body.mode == "any" else len(ended) == len(found)
    return Reply(status=200, body={"done": done, "waitpoints": [_outcome(tx, point) for point in found]})


def _message(tx: Transaction, fence: Any, call_id: CallId) -> dict[str, Any]:
    taken = messages.take(tx, **fence, call_id=call_id)
    if taken is None:
        return {"state": "timed_out", "number": None, "text": None, "sent_at": None}
    sent_at = datetime.fromtimestamp(taken.wall_ns / 1e9, UTC).isoformat(timespec="milliseconds")
    return {"state": "resolved", "number": taken.number, "text": taken.text, "sent_at": sent_at}


def _outcome(tx: Transaction, point: Waitpoint) -> dict[str, Any]:
    """A waitpoint as the agent sees it."""
    is_timer = point.kind is WaitpointKind.TIMER
    state = "open" if point.is_open else "timed_out" if point.timed_out and not is_timer else "resolved"
    seen: dict[str, Any] = {"waitpoint": point.waitpoint_id, "kind": point.kind.value, "state": state}
    if point.kind is WaitpointKind.ASK:
        answer = questions.answer_of(tx, point)
        seen |= {"answer": answer and answer.text, "files": list(answer.files) if answer else []}
    if point.kind is WaitpointKind.CHILD:
        ended = point.resolution or {}
        seen |= {"session": point.data["child"], "status": ended.get("status"), "exit_status": ended.get("exit_status")}
    return seen
