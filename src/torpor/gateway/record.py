"""The gateway's writes: every step of a call goes to the log through here, durably where something depends on it.

`intend` (which mostly is the sending as well), `send`, `complete` and `fail` reach the disk before they return. Heads,
chunks and notes are written before anything is delivered, which survives the death of every process; the next durable
write takes them to the disk.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torpor.core.branch import ContextTree
from torpor.core.call import Call, CallState, ResponseHead
from torpor.core.clock import Clock
from torpor.core.crash import crash_point
from torpor.core.divergence import OnDivergence, note_to_agent
from torpor.core.events import Event, EventDraft, Kind
from torpor.core.ids import CallId, SessionId, StreamId, new_call_id
from torpor.core.money import Bill, Verdict
from torpor.core.redo import RedoEntry, RedoSet, entry_of, follow
from torpor.core.waitpoint import WaitpointKind
from torpor.db import budgets, calls, checkpoints, children, log, messages, notes, redo, requests, sessions, waitpoints
from torpor.db.ahead import Ahead
from torpor.db.answers import Packed
from torpor.db.blobs import BLOB_BYTES_MIN, Stored
from torpor.db.calls import Chunk, NewCall
from torpor.db.children import OnCancel
from torpor.db.database import Database, Transaction
from torpor.db.requests import PreparedBody, RequestHead
from torpor.gateway.admission import LocalAnswer
from torpor.gateway.claim import Claim, attached, claim_of, form_of
from torpor.gateway.delivery import Recording
from torpor.gateway.dialects.base import Shape

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """The agent left the log's path: calls that it was expected to make again, those of them that are effects."""

    pending: Sequence[CallId]
    orphaned: Sequence[CallId]
    policy: OnDivergence

    @property
    def data(self) -> dict[str, Any]:
        return {"pending": list(self.pending), "orphaned": list(self.orphaned), "policy": self.policy.value}


class Recorder:
    """One session's log, as this owner writes it."""

    def __init__(self, *, database: Database, session_id: SessionId, owner_token: int, clock: Clock) -> None:
        self._database = database
        self._session_id = session_id
        self._owner_token = owner_token
        self._ahead = Ahead(database=database, session_id=session_id, owner_token=owner_token)
        self._packing = asyncio.Lock()
        self.clock = clock

    def new_call_id(self) -> CallId:
        return new_call_id(self.clock.wall_ns())

    def wall_ns(self) -> int:
        return self.clock.wall_ns()

    async def intend(
        self,
        call: NewCall,
        *,
        head: RequestHead,
        body: PreparedBody,
        at_once: bool,
        usage_asked: bool,
        left: Departure | None = None,
        note: str | None = None,
    ) -> Call:
        """Record that a call will be made; with it, if so, that the agent left the log's path, and what it is told.

        With `at_once` its first attempt is opened in the same transaction, unless a budget has to be asked: nothing
        stands between the two then, and a kill -9 before it leaves the request to init, as one before call.intended.
        """
        prepared = await self._ahead.request(body)

        def work(tx: Transaction) -> Call:
            wall_ns = self.clock.wall_ns()
            if left is not None:
                self._append(tx, Kind.CALL_DIVERGED, call.incarnation, call.call_id, left.data)
            if note is not None:
                self._append_note(tx, Kind.AGENT_TOLD, call.incarnation, call.call_id, note)
            new: dict[str, Any] = {"call": call, "head": head, "body": prepared, "wall_ns": wall_ns}
            return calls.intend(tx, **self.fence, **new, at_once=at_once, usage_asked=usage_asked)

        call_made = await self._database.write(work, durable=True)
        crash_point("call.sent" if call_made.state is CallState.SENT else "call.intended")
        return call_made

    async def send(
        self, call_id: CallId, *, needed_nanousd: int | None = None, usage_asked: bool = False
    ) -> int | Verdict:
        """Open the next attempt, before its first byte goes upstream; or say why the budget does not allow it now.

        Args:
            needed_nanousd: what it may cost at most, if it has to fit a budget: that much is reserved with the sending.
            usage_asked: what is sent asks for token counts, and the logged request does not.
        """

        def work(tx: Transaction) -> int | Verdict:
            wall_ns = self.clock.wall_ns()
            if needed_nanousd is not None:
                asked: dict[str, Any] = {"call_id": call_id, "needed_nanousd": needed_nanousd, "wall_ns": wall_ns}
                verdict = budgets.admit(tx, **self.fence, **asked)
                if verdict is not Verdict.SEND:
                    return verdict
            sent: dict[str, Any] = {"call_id": call_id, "wall_ns": wall_ns, "reserved_nanousd": needed_nanousd}
            return calls.mark_sent(tx, **self.fence, **sent, usage_asked=usage_asked).number

        attempt = await self._database.write(work, durable=True)
        if attempt is Verdict.HOLD:
            crash_point("waitpoint.created")
        elif attempt is not Verdict.WAIT:
            crash_point("call.sent")
        return attempt

    async def has_budget(self) -> bool:
        """Whether anything limits this session; that never changes, only the limit does."""
        session = await self._database.read(lambda tx: sessions.get(tx, self._session_id))
        return session.budget_nanousd is not None

    async def retry(self, call_id: CallId, facts: Mapping[str, Any]) -> None:
        """The provider refused the attempt for now: it is sent again after a pause. Nothing outside depends on it."""

        def work(tx: Transaction) -> Event:
            return calls.note_retry(tx, **self.fence, call_id=call_id, facts=facts, wall_ns=self.clock.wall_ns())

        await self._database.write(work, durable=False, brief=True)
        crash_point("call.retried")

    async def receive(
        self, call_id: CallId, attempt: int, *, head: ResponseHead | None, chunks: Sequence[Chunk]
    ) -> None:
        """Write the head (the first time) and the chunks that arrived."""

        def work(tx: Transaction) -> None:
            if head is not None:
                wall_ns = self.clock.wall_ns()
                calls.record_head(tx, **self.fence, call_id=call_id, attempt=attempt, head=head, wall_ns=wall_ns)
            calls.append_chunks(tx, **self.fence, call_id=call_id, attempt=attempt, chunks=chunks)

        await self._database.write(work, durable=False, brief=True)
        crash_point("call.received")

    async def complete(
        self,
        call_id: CallId,
        *,
        recording: Recording,
        usage: Mapping[str, Any],
        facts: Mapping[str, Any],
        bill: Bill | None = None,
    ) -> None:
        """The answer ended properly; a long one is stored first. Its chunks stay until `drop_chunks`."""
        packed = await self._pack(call_id, recording)

        def work(tx: Transaction) -> Event:
            ended: dict[str, Any] = {"call_id": call_id, "usage": usage, "facts": facts, "bill": bill}
            ended["packed"] = packed
            return calls.complete(tx, **self.fence, **ended, wall_ns=self.clock.wall_ns())

        await self._database.write(work, durable=True)
        crash_point("call.completed")

    async def answer(self, call_id: CallId, write: Callable[[Transaction], LocalAnswer]) -> LocalAnswer:
        """Do what a call of Torpor's own asks for, and record its whole answer, in one durable transaction.

        A kill -9 before it leaves a call that was never sent, after it an answer that was not delivered.
        """

        def work(tx: Transaction) -> LocalAnswer:
            wall_ns = self.clock.wall_ns()
            number = calls.mark_sent(tx, **self.fence, call_id=call_id, wall_ns=wall_ns).number
            answer = write(tx)
            step: dict[str, Any] = {**self.fence, "call_id": call_id}
            calls.record_head(tx, **step, attempt=number, head=answer.head, wall_ns=wall_ns)
            chunks = [Chunk(number=0, offset_ns=0, data=answer.body)] if answer.body else []
            calls.append_chunks(tx, **step, attempt=number, chunks=chunks)
            calls.complete(tx, **step, usage={}, facts={"status": answer.head.status}, wall_ns=wall_ns)
            return answer

        answer = await self._database.write(work, durable=True)
        crash_point("call.completed")
        return answer

    async def hold(self, prepare: Callable[[Transaction], T]) -> T:
        """Record what a call of Torpor's own waits on before it is answered, durably.

        A kill -9 behind it leaves a call that was never sent, which finds what it waits on again.
        """
        held = await self._database.write(prepare, durable=True)
        crash_point("waitpoint.created")
        return held

    async def read(self, work: Callable[[Transaction, SessionId], T]) -> T:
        """What the log says now, of this session."""
        return await self._database.read(lambda tx: work(tx, self._session_id))

    async def store_text(self, text: str) -> Stored | None:
        """Store a text that is large, for the transaction that makes it a block."""
        return await self._ahead.text(text)

    def append_note(self, tx: Transaction, call_id: CallId, text: str) -> int:
        """Within `answer`: the agent's note; its seq."""
        incarnation = sessions.get(tx, self._session_id).incarnation
        return self._append_note(tx, Kind.NOTE_ADDED, incarnation, call_id, text)

    def send_out(self, tx: Transaction, call_id: CallId, text: str, stored: Stored | None) -> int:
        """Within `answer`: the agent's message to the outside; its number."""
        wall_ns = self.clock.wall_ns()
        return messages.send(tx, **self.fence, call_id=call_id, text=text, wall_ns=wall_ns, stored=stored).number

    def begin_child(self, tx: Transaction, call_id: CallId, child_id: SessionId, on_cancel: str) -> dict[str, Any]:
        """Within `answer`: a session that was made is this one's child from now on, and a node is to run it."""
        made: dict[str, Any] = {"kind": WaitpointKind.CHILD, "call_id": call_id, "wall_ns": self.clock.wall_ns()}
        point = waitpoints.create(tx, **self.fence, **made, data={"child": child_id})
        bound: dict[str, Any] = {"child_id": child_id, "waitpoint_id": point.waitpoint_id}
        children.add(tx, **self.fence, **bound, on_cancel=OnCancel(on_cancel))
        return {"session": child_id, "waitpoint": point.waitpoint_id}

    def describe(self, tx: Transaction) -> dict[str, Any]:
        """Within `answer`: what an agent may know of its session."""
        session = sessions.get(tx, self._session_id)
        newest = checkpoints.newest(tx, self._session_id)
        started = log.last_of_kind(tx, self._session_id, Kind.INCARNATION_STARTED)
        slept_ns = 0
        if started is not None and started.data.get("mode") == "restore":
            point = checkpoints.numbered(tx, self._session_id, started.data["checkpoint"])
            slept_ns = max(0, started.wall_ns - point.wall_ns) if point is not None else 0
        return {
            "session": session.session_id,
            "name": session.name,
            "incarnation": session.incarnation,
            "slept_for": slept_ns // 1_000_000 / 1000,
            "memory_lost": started is not None and started.data.get("memory_lost", False),
            "checkpoint": newest.number if newest is not None else None,
            "head": session.head_seq,
        }

    async def fail(
        self,
        call_id: CallId,
        *,
        error: str,
        response: tuple[ResponseHead, bytes] | None,
        bill: Bill | None = None,
        recording: Recording | None = None,
    ) -> Call:
        """The call has no answer; `response` is what the agent is told instead, as an attempt of its own.

        Args:
            recording: what came of the answer that broke off.
        """
        packed = None if recording is None else await self._pack(call_id, recording)

        def work(tx: Transaction) -> Call:
            ended: dict[str, Any] = {"call_id": call_id, "error": error, "response": response, "bill": bill}
            ended["packed"] = packed
            calls.fail(tx, **self.fence, **ended, wall_ns=self.clock.wall_ns())
            return calls.load_call(tx, call_id)

        return await self._database.write(work, durable=True)

    async def drop_chunks(self, call_id: CallId, recording: Recording) -> None:
        """Drop the chunks of an ended answer that was so long that its row was made ahead."""
        if recording.body_bytes >= BLOB_BYTES_MIN:
            await self._ahead.drop_chunks(call_id, recording.attempt)

    async def drop_rest(self) -> None:
        """The same for every answer of which chunks are left."""
        await self._ahead.drop_rest()

    async def _pack(self, call_id: CallId, recording: Recording) -> Packed | None:
        if recording.body_bytes < BLOB_BYTES_MIN:
            return None
        async with self._packing:  # one at a time: it takes several times an answer's size in memory
            return await self._ahead.answer(call_id, recording.attempt)

    async def load_sent(self) -> list[tuple[Call, list[Chunk]]]:
        """The calls that an earlier node had sent and not answered, with what came of their answers."""

        def work(tx: Transaction) -> list[tuple[Call, list[Chunk]]]:
            sent = calls.load_in_state(tx, self._session_id, CallState.SENT)
            return [(call, calls.load_chunks(tx, call.call_id, call.attempts[-1].number)) for call in sent]

        return await self._database.read(work)

    async def tear_open(self, bills: Mapping[CallId, Bill]) -> list[CallId]:
        """The pumps of an earlier node are dead: what it had sent and not answered is torn."""
        return await self._ahead.tear_open(wall_ns=self.clock.wall_ns(), bills=bills)

    async def attach(self, kind: Kind, claim: Claim, *, cursor_seq: int, attempt: int) -> None:
        """A stream receives a call that is in the log already (`kind`: repeated or joined); the cursor moves there.

        Raises:
            Conflict: `redo_refused`, a repeated call was not expected from this incarnation, or was repeated before.
        """

        def work(tx: Transaction) -> None:
            self._append(tx, kind, claim.incarnation, claim.call_id, attached(claim, attempt, inherited=False))
            sessions.set_cursor(tx, **self.fence, cursor_seq=cursor_seq)
            if kind is Kind.CALL_REPEATED:
                redo.consume(tx, **self.fence, incarnation=claim.incarnation, call_id=claim.call_id)

        await self._database.write(work, durable=False, brief=True)

    async def inherit(self, claim: Claim, *, attempt: int) -> None:
        """A stream of an earlier incarnation, or node, goes on with its call."""
        data = attached(claim, attempt, inherited=True)
        await self.note(Kind.CALL_JOINED, claim.incarnation, claim.call_id, data)

    async def note(self, kind: Kind, incarnation: int, call_id: CallId | None, data: Mapping[str, Any]) -> None:
        """Append a bookkeeping event that nothing outside depends on."""

        def work(tx: Transaction) -> int:
            return self._append(tx, kind, incarnation, call_id, data)

        await self._database.write(work, durable=False, brief=True)

    async def deliver(self, incarnation: int, call_id: CallId, data: Mapping[str, Any]) -> None:
        """Record how a call's stream ended; durably, for init tells it to the next node until it may forget it.

        A kill -9 before the write leaves it to init; one after it (`call.delivered`) leaves init a stream whose end is
        logged, which the next node refuses.
        """
        await self._database.write(
            lambda tx: self._append(tx, Kind.CALL_DELIVERED, incarnation, call_id, data), durable=True
        )
        crash_point("call.delivered")

    async def load(self, call_id: CallId) -> Call:
        return await self._database.read(lambda tx: calls.load_call(tx, call_id))

    async def load_request(self, call_id: CallId) -> tuple[RequestHead, bytes]:
        return await self._database.read(lambda tx: requests.get_request(tx, call_id))

    async def replay(self, call: Call) -> Recording:
        """The rows of an ended call's last attempt."""
        attempt = call.attempts[-1]
        recording = Recording(attempt.number)
        if attempt.head is not None:
            recording.add_head(attempt.head)
        for chunk in await self._database.read(lambda tx: calls.load_chunks(tx, call.call_id, attempt.number)):
            recording.add_chunk(chunk.data)
        recording.end(finished=attempt.finished)
        return recording

    async def load_tree(self) -> ContextTree:
        """The context events with the cursor where the session's row has it."""

        def work(tx: Transaction) -> ContextTree:
            root, *made = log.list_parents_of_calls(tx, self._session_id)
            tree = ContextTree(root.seq)
            for call in made:
                if call.parent_seq is not None:
                    tree.load(call.seq, call.parent_seq)
            tree.rewind(sessions.get(tx, self._session_id).cursor_seq)
            return tree

        return await self._database.read(work)

    async def store_redo(self, incarnation: int, began_with: RedoSet) -> None:
        await self._database.write(
            lambda tx: redo.store(tx, **self.fence, incarnation=incarnation, redo=began_with), durable=False
        )

    async def load_redo(self, incarnation: int) -> RedoSet:
        """The redo set that an incarnation began with, brought up to now by its events."""

        def work(tx: Transaction) -> RedoSet:
            by_id = {call.call_id: call for call in calls.load_calls(tx, self._session_id)}
            stored = redo.load(tx, self._session_id, incarnation)

            def entries(ids: Iterable[CallId]) -> list[RedoEntry]:
                return [entry_of(by_id[call_id]) for call_id in ids if call_id in by_id]

            began_with = RedoSet(
                entries(stored.pending), joinable=entries(stored.joinable), attached=entries(stored.attached)
            )
            events = [event for event in log.events(tx, self._session_id) if event.incarnation == incarnation]
            return follow(began_with, events, by_id)

        return await self._database.read(work)

    async def note_about(self, orphaned: Sequence[CallId]) -> str:
        """What the agent is told of the path that it left."""

        def work(tx: Transaction) -> str:
            return _note(tx, orphaned)

        return await self._database.read(work)

    async def load_untold(self, incarnation: int) -> str | None:
        """The note that an incarnation is still to be told, if it left the path under the policy `tell`."""

        def work(tx: Transaction) -> str | None:
            left = log.last_of_kind(tx, self._session_id, Kind.CALL_DIVERGED)
            told = log.last_of_kind(tx, self._session_id, Kind.AGENT_TOLD)
            if left is None or left.incarnation != incarnation or left.data.get("policy") != OnDivergence.TELL:
                return None
            return _note(tx, left.data["orphaned"]) if told is None or told.seq < left.seq else None

        return await self._database.read(work)

    async def load_note(self, call_id: CallId) -> str | None:
        """The note that goes with a call.

        Raises:
            Conflict: `block_redacted`.
        """

        def work(tx: Transaction) -> str | None:
            notes_told = log.all_of_kind(tx, self._session_id, Kind.AGENT_TOLD)
            told = [event for event in notes_told if event.call_id == call_id]
            return notes.get(tx, told[-1]) if told else None

        return await self._database.read(work)

    async def load_claims(self, incarnation: int) -> list[Claim]:
        """The streams of an incarnation that have a call and whose end is not logged, in the order of the log."""

        def work(tx: Transaction) -> list[Claim]:
            claims: dict[StreamId, Claim] = {}
            for event in log.events(tx, self._session_id):
                if event.incarnation != incarnation or event.call_id is None:
                    continue
                if event.kind in _CLAIMING:
                    claims[event.data["stream"]] = claim_of(tx, event, event.call_id)
                elif event.kind is Kind.CALL_DELIVERED:
                    claims.pop(event.data["stream"], None)
            return list(claims.values())

        return await self._database.read(work)

    async def load_form(self, call_id: CallId, stream: StreamId) -> tuple[Shape, bool]:
        """How a stream that is inherited was to get its call's answer: `shape` and `hide_usage` of its claim."""

        def work(tx: Transaction) -> tuple[Shape, bool]:
            form = (Shape.AS_SENT, False)
            begun = calls.load_call(tx, call_id).intended_seq
            for event in log.events(tx, self._session_id, after_seq=begun - 1):
                if event.call_id == call_id and event.kind in _CLAIMING and event.data["stream"] == stream:
                    form = form_of(event)
            return form

        return await self._database.read(work)

    @property
    def fence(self) -> Any:
        """What every statement that writes presents."""
        return {"session_id": self._session_id, "owner_token": self._owner_token}

    def _append_note(self, tx: Transaction, kind: Kind, incarnation: int, call_id: CallId, text: str) -> int:
        note: dict[str, Any] = {"kind": kind, "incarnation": incarnation, "call_id": call_id, "text": text}
        return notes.add(tx, **self.fence, **note, wall_ns=self.clock.wall_ns()).seq

    def _append(
        self, tx: Transaction, kind: Kind, incarnation: int, call_id: CallId | None, data: Mapping[str, Any]
    ) -> int:
        draft = EventDraft(kind=kind, incarnation=incarnation, call_id=call_id, data=data)
        return log.append(tx, **self.fence, drafts=[draft], wall_ns=self.clock.wall_ns())[0].seq


_CLAIMING = frozenset({Kind.CALL_INTENDED, Kind.CALL_REPEATED, Kind.CALL_JOINED})


def _note(tx: Transaction, orphaned: Sequence[CallId]) -> str:
    made = [calls.load_call(tx, call_id) for call_id in orphaned]
    return note_to_agent([f"{call.method} {call.target}" for call in made])


def needs_sending(call: Call) -> bool:
    """Whether a call that nobody pumps has no answer yet, and may get one."""
    return call.state in {CallState.INTENDED, CallState.TORN, CallState.UNKNOWN}
