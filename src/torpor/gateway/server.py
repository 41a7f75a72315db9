"""The host's HTTP side of one session: every request of its agent, from its stream to the log and back.

`serve` is the whole life of a stream; `inherit` is the same for a stream that another incarnation or node began. What
answers a request is decided under one lock with the writes that record it, so the log tells the same story as memory.
Pumps belong to `run` and outlive every stream and every sandbox.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from torpor.config import Upstream
from torpor.core.branch import ContextTree
from torpor.core.call import Call
from torpor.core.checkpoint import OpenStream, StreamFate
from torpor.core.clock import Clock
from torpor.core.delivery import untouched_bytes
from torpor.core.events import Kind
from torpor.core.ids import CallId, SessionId, StreamId
from torpor.core.join import StreamEnd
from torpor.core.redo import RedoSet, entry_of
from torpor.db.database import Database
from torpor.gateway.admission import LocalAnswer
from torpor.gateway.delivery import Recording, closed, deliver, deliver_locally, rows_in_shape
from torpor.gateway.dialects import dialect_named
from torpor.gateway.intake import Intake, from_log, take_in
from torpor.gateway.pump import Pump
from torpor.gateway.record import Claim, Recorder, needs_sending
from torpor.gateway.upstream import UpstreamClient
from torpor.sandbox.streams import Stream, StreamGone

OnCall = Callable[[CallId], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCall:
    """What a cut must know of a stream besides the guest's positions; the fields are those of `OpenStream`."""

    call_id: CallId
    attempt: int
    untouched_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attachment:
    """A stream with the call that it receives. `pump` is there if it was started for this stream."""

    claim: Claim
    call: Call
    recording: Recording
    pump: Pump | None = None


class Gateway:
    """One session's gateway on this node; `run` it in a TaskGroup.

    Args:
        on_call: awaited for each LLM call that is on its way upstream, before a byte of its answer is delivered: the
            runtime takes a checkpoint there, and keeps its failures to itself.
    """

    def __init__(
        self,
        *,
        database: Database,
        session_id: SessionId,
        owner_token: int,
        clock: Clock,
        upstreams: Sequence[Upstream],
        on_call: OnCall,
    ) -> None:
        self._recorder = Recorder(database=database, session_id=session_id, owner_token=owner_token, clock=clock)
        self._upstreams = UpstreamClient(upstreams, clock)
        self._on_call = on_call
        self._turnstile = asyncio.Lock()
        self._running = asyncio.Event()
        self._closing = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._pumps: dict[CallId, Pump] = {}
        self._open: dict[StreamId, _Attachment] = {}
        self._redo = RedoSet()
        self._tree = ContextTree(1)
        self._incarnation = 0

    async def run(self) -> None:
        """Own the pumps until `close`.

        Raises:
            ExceptionGroup: a pump could not write the log (Superseded, or the database's own failures).
        """
        async with self._upstreams, asyncio.TaskGroup() as group:
            self._group = group
            self._running.set()
            await self._closing.wait()
            for pump in self._pumps.values():
                pump.abandon()

    def close(self) -> None:
        """Abandon the pumps that still run: their calls are torn for the next owner. `run` then returns."""
        self._closing.set()

    async def recover(self) -> list[CallId]:
        """At the start of a node: what the one before had sent and not answered is torn from now on."""
        return await self._recorder.tear_open()

    async def begin_incarnation(self, incarnation: int, redo: RedoSet, *, adopted: bool) -> None:
        """Serve a life of the sandbox, new or adopted; the streams of the one before are forgotten, its pumps live on.

        Args:
            redo: what may answer its calls from the log; that of a new life is stored.
        """
        async with self._turnstile:
            if not adopted:
                await self._recorder.store_redo(incarnation, redo)
            self._tree = await self._recorder.load_tree()
            self._incarnation = incarnation
            self._redo = redo
            self._open.clear()

    async def load_incarnation(self, incarnation: int) -> tuple[RedoSet, Mapping[StreamId, OpenCall]]:
        """What the log knows of a life of the sandbox: its redo set by now, and the calls of its streams.

        A stream is there until its end was logged; whether the guest still has it, the guest knows.
        """
        redo = await self._recorder.load_redo(incarnation)
        streams: dict[StreamId, OpenCall] = {}
        for claim in await self._recorder.load_claims(incarnation):
            call = await self._recorder.load(claim.call_id)
            streams[claim.stream] = _open_call(claim, max(1, len(call.attempts)))
        return redo, streams

    async def serve(self, stream: Stream, *, incarnation: int) -> None:
        """Take one connection of the agent through its whole life.

        Raises:
            Superseded: this node lost the session.
        """
        try:
            taken_in = await take_in(stream)
            if taken_in is None:
                await stream.finish(stream.sent)
                await closed(stream)
            elif isinstance(taken_in, LocalAnswer):
                await deliver_locally(stream, taken_in.head, taken_in.body)
            else:
                await self._attend(stream, await self._claim(stream, taken_in, incarnation))
        except StreamGone:
            await closed(stream)

    async def inherit(self, stream: Stream, open_stream: OpenStream, fate: StreamFate, *, incarnation: int) -> None:
        """Take a stream that began in another incarnation, or under another node, through the rest of its life.

        Raises:
            Superseded: this node lost the session.
        """
        call_id = open_stream.call_id
        if fate is StreamFate.RECEIVE or call_id is None:
            await self.serve(stream, incarnation=incarnation)
        elif fate is StreamFate.RESET:
            await self._break_off(stream, open_stream, call_id, incarnation)
        else:
            try:
                await self._attend(stream, await self._reattach(stream, open_stream, call_id, incarnation))
            except StreamGone:
                await closed(stream)

    @asynccontextmanager
    async def quiet(self) -> AsyncGenerator[None]:
        """Hold all decisions about streams: the log's head and `open_streams` then agree, for a cut."""
        async with self._turnstile:
            yield

    def open_streams(self) -> dict[StreamId, OpenCall]:
        """The streams whose request is a call by now."""
        return {
            stream: _open_call(attachment.claim, attachment.recording.attempt)
            for stream, attachment in self._open.items()
        }

    def pump_alive(self, call_id: CallId) -> bool:
        return call_id in self._pumps

    def pending_redo(self) -> tuple[CallId, ...]:
        """Calls that the agent is expected to make again: a checkpoint keeps them."""
        return self._redo.pending

    def joinable(self) -> tuple[CallId, ...]:
        """Calls that an equal request would join: a checkpoint keeps them."""
        return self._redo.joinable

    async def _claim(self, stream: Stream, intake: Intake, incarnation: int) -> _Attachment:
        """Decide which call answers a request, record that, and acknowledge the request."""
        await self._running.wait()
        async with self._turnstile:
            self._check_current(stream, incarnation)
            expected = self._redo.pending
            call_id = self._redo.match(intake.key)
            if call_id is None:
                attachment = await self._new_call(stream, intake, incarnation, expected)
            else:
                kind = Kind.CALL_REPEATED if call_id in expected else Kind.CALL_JOINED
                attachment = await self._old_call(stream, intake, incarnation, call_id, kind)
            self._open[stream_id(stream)] = attachment
            stream.acknowledge(intake.request.length)
            return attachment

    async def _new_call(
        self, stream: Stream, intake: Intake, incarnation: int, expected: tuple[CallId, ...]
    ) -> _Attachment:
        call_id = self._recorder.new_call_id()
        call = await self._recorder.intend(
            intake.new_call(call_id, stream_id(stream), incarnation),
            head=intake.head,
            body=intake.request.body,
            diverged_from=expected or None,
        )
        self._tree.hang(call.intended_seq)
        self._redo.attach(entry_of(call))
        pump = self._start(call, intake)
        claim = intake.claim(call_id, stream_id(stream), incarnation)
        return _Attachment(claim=claim, call=call, recording=pump.recording, pump=pump)

    async def _old_call(
        self, stream: Stream, intake: Intake, incarnation: int, call_id: CallId, kind: Kind
    ) -> _Attachment:
        call, recording, pump = await self._revive(call_id)
        claim = intake.claim(call_id, stream_id(stream), incarnation, intake.shape_for(call.key))
        self._tree.reach(call.intended_seq)
        await self._recorder.attach(kind, claim, cursor_seq=self._tree.cursor, attempt=recording.attempt)
        return _Attachment(claim=claim, call=call, recording=recording, pump=pump)

    async def _reattach(
        self, stream: Stream, open_stream: OpenStream, call_id: CallId, incarnation: int
    ) -> _Attachment:
        await self._running.wait()
        async with self._turnstile:
            self._check_current(stream, incarnation)
            call, recording, _ = await self._revive(call_id)
            claim = Claim(
                call_id=call_id,
                stream=open_stream.stream,
                incarnation=incarnation,
                request_bytes=open_stream.read,
                continued=open_stream.untouched_bytes > 0,
                shape=await self._recorder.load_shape(call_id, open_stream.stream),
            )
            attachment = _Attachment(claim=claim, call=call, recording=recording)
            await self._recorder.inherit(claim, attempt=recording.attempt)
            self._open[open_stream.stream] = attachment
            stream.acknowledge(stream.received)
            return attachment

    async def _revive(self, call_id: CallId) -> tuple[Call, Recording, Pump | None]:
        """The rows of a call that is in the log: its pump's, those that are written, or those of a new attempt."""
        pump = self._pumps.get(call_id)
        if pump is not None:
            return pump.call, pump.recording, None
        call = await self._recorder.load(call_id)
        if needs_sending(call):
            head, body = await self._recorder.load_request(call_id)
            pump = self._start(call, from_log(head, body))
            return call, pump.recording, pump
        return call, await self._recorder.replay(call), None

    def _start(self, call: Call, intake: Intake) -> Pump:
        assert self._group is not None
        pump = Pump(call=call, intake=intake, recorder=self._recorder, upstreams=self._upstreams)
        self._pumps[call.call_id] = pump
        pump.start(self._group, self._pump_ended)
        return pump

    def _pump_ended(self, pump: Pump) -> None:
        del self._pumps[pump.call.call_id]
        if pump.failed:
            self._redo.failed(pump.call.call_id)

    async def _attend(self, stream: Stream, attachment: _Attachment) -> None:
        """Deliver to a stream until it ends, and record how."""
        claim = attachment.claim
        if attachment.pump is not None and attachment.call.is_llm:
            await attachment.pump.sent.wait()
            await self._on_call(claim.call_id)
        rows = rows_in_shape(attachment.recording, dialect_named(attachment.call.dialect), claim.shape)
        end = await deliver(stream, rows, continued=claim.continued)
        if end is not None:
            await self._detach(stream, claim.stream, claim.call_id, claim.incarnation, end)

    async def _detach(
        self, stream: Stream, number: StreamId, call_id: CallId, incarnation: int, end: StreamEnd
    ) -> None:
        async with self._turnstile:
            if incarnation != self._incarnation:
                return
            data = {"stream": number, "end": end.value, "taken_bytes": stream.taken}
            await self._recorder.note(Kind.CALL_DELIVERED, incarnation, call_id, data)
            self._redo.ended(call_id, end)
            self._open.pop(number, None)

    async def _break_off(self, stream: Stream, open_stream: OpenStream, call_id: CallId, incarnation: int) -> None:
        """The agent holds a part of an answer that can't be continued: it learns that, and may ask again."""
        data = {"stream": open_stream.stream, "taken_bytes": open_stream.taken, "attempt": open_stream.attempt}
        async with self._turnstile:
            await self._recorder.note(Kind.STREAM_RESET, incarnation, call_id, data)
        stream.reset()
        await closed(stream)
        await self._detach(stream, open_stream.stream, call_id, incarnation, StreamEnd.RESET)

    def _check_current(self, stream: Stream, incarnation: int) -> None:
        if incarnation != self._incarnation:
            stream.reset()
            raise StreamGone(stream.id, "its sandbox was replaced")


def stream_id(stream: Stream) -> StreamId:
    return StreamId(stream.id)


def _open_call(claim: Claim, attempt: int) -> OpenCall:
    untouched = untouched_bytes(None, continued=claim.continued)
    return OpenCall(call_id=claim.call_id, attempt=attempt, untouched_bytes=untouched)
