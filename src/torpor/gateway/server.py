"""The host's HTTP side of one session: every request of its agent, from its stream to the log and back.

`serve` is the whole life of a stream; `inherit` is the same for a stream that another incarnation or node began. What
answers a request is decided one by one (`turnstile`), in the order of the writes that record it, so the log tells the
same story as memory. Pumps belong to `run` and outlive every stream and every sandbox.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

from torpor.config import PriceRule, Upstream
from torpor.core.branch import ContextTree
from torpor.core.call import Call
from torpor.core.checkpoint import OpenStream, StreamFate
from torpor.core.clock import Clock
from torpor.core.delivery import untouched_bytes
from torpor.core.divergence import OnDivergence
from torpor.core.events import Kind
from torpor.core.ids import CallId, SessionId, StreamId
from torpor.core.join import StreamEnd, end_of_stream
from torpor.core.redo import RedoSet, entry_of
from torpor.db.database import Database
from torpor.gateway.admission import LocalAnswer
from torpor.gateway.attachment import Attachment, Beginning
from torpor.gateway.billing import Billing
from torpor.gateway.claim import Claim
from torpor.gateway.crossroads import Crossroads
from torpor.gateway.delivery import closed, deliver, deliver_locally, rows_in_shape
from torpor.gateway.dialects import dialect_named
from torpor.gateway.idleness import Idleness, Waiting
from torpor.gateway.intake import Intake, take_in
from torpor.gateway.own import CheckpointFor
from torpor.gateway.prices import PriceBook
from torpor.gateway.pumps import OnCall, Pumps
from torpor.gateway.record import Departure, Recorder
from torpor.gateway.request import Room
from torpor.gateway.routing import Routing
from torpor.gateway.turnstile import Turn, Turnstile
from torpor.gateway.upstream import UpstreamClient
from torpor.gateway.waits import OnWait, Waits
from torpor.sandbox.streams import Stream, StreamGone

SETTLE_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCall:
    """What a cut must know of a stream besides the guest's positions; the fields are those of `OpenStream`."""

    call_id: CallId
    attempt: int
    untouched_bytes: int


def _tell_nobody(_what: str) -> None:
    return


class Gateway:
    """One session's gateway on this node; `run` it in a TaskGroup.

    Args:
        on_call: awaited for each LLM call that is on its way upstream, before a byte of its answer is delivered: the
            runtime takes a checkpoint there, and keeps its failures to itself.
        checkpoint_for: makes the checkpoint that the agent itself asks for.
        on_wait: told, in words, what a person has to do before a call can be answered.
        crossroads: what happens when the agent leaves the log's path; without one it may.
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
        checkpoint_for: CheckpointFor,
        on_wait: OnWait = _tell_nobody,
        crossroads: Crossroads | None = None,
        prices: Sequence[PriceRule] = (),
    ) -> None:
        self._recorder = Recorder(database=database, session_id=session_id, owner_token=owner_token, clock=clock)
        self._routing = Routing(upstreams)
        self._billing = Billing(recorder=self._recorder, book=PriceBook(prices), routing=self._routing)
        self._waits = Waits(self._recorder, on_wait)
        self._pumps = Pumps(
            recorder=self._recorder,
            upstreams=UpstreamClient(clock),
            billing=self._billing,
            routing=self._routing,
            on_call=on_call,
            on_failed=self._failed,
            waits=self._waits,
            checkpoint_for=checkpoint_for,
        )
        self._crossroads = crossroads or Crossroads(OnDivergence.CONTINUE)
        self._room = Room()
        self._to_tell: str | None = None
        self._turnstile = Turnstile()
        self.idleness = Idleness()
        self._beginning: dict[StreamId, Beginning] = {}
        self._open: dict[StreamId, Attachment] = {}
        self._holders: dict[CallId, StreamId] = {}
        self._redo = RedoSet()
        self._tree = ContextTree(1)
        self._incarnation = 0

    async def run(self) -> None:
        """Own the pumps until `close`; then drop the chunks of long answers that they had no time to drop.

        Raises:
            ExceptionGroup: a pump could not write the log (Superseded, or the database's own failures).
        """
        await self._pumps.run()
        await self._recorder.drop_rest()

    def close(self) -> None:
        """Abandon the pumps that still run: their calls are torn for the next owner. `run` then returns."""
        self._pumps.close()

    async def recover(self) -> list[CallId]:
        """At the start of a node: what the one before had sent and not answered is torn from now on."""
        return await self._recorder.tear_open(await self._billing.bill_torn())

    def look_again(self) -> None:
        """Let every call that waits look again: something was resolved, or the session runs (again)."""
        self._billing.look_again()
        self._waits.look_again()

    async def begin_incarnation(self, incarnation: int, redo: RedoSet, *, adopted: bool) -> None:
        """Serve a life of the sandbox, new or adopted; the streams of the one before are forgotten, its pumps live on.

        Args:
            redo: what may answer its calls from the log; that of a new life is stored.
        """
        async with self._turnstile.alone():
            if not adopted:
                await self._recorder.store_redo(incarnation, redo)
            self._tree = await self._recorder.load_tree()
            self._to_tell = await self._recorder.load_untold(incarnation)
            self._crossroads.begin()
            self._incarnation = incarnation
            self._redo = redo
            self._open.clear()
            self._holders.clear()

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
            with self.idleness.asking(stream):
                received = await self._receive(stream, incarnation)
            if received is None:
                await stream.finish(stream.sent)
                await _let_go(stream)
            elif isinstance(received, LocalAnswer):
                await deliver_locally(stream, received.head, received.body)
                await _let_go(stream)
            else:
                await self._attend(stream, received)
        except StreamGone:
            await _let_go(stream)

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
                attachment = await self._reattach(stream, open_stream, call_id, incarnation)
                if attachment is None:
                    await self._break_off(stream, open_stream, call_id, incarnation)
                else:
                    await self._attend(stream, attachment)
            except StreamGone:
                await _let_go(stream)

    @asynccontextmanager
    async def quiet(self) -> AsyncGenerator[None]:
        """Hold all decisions about streams: the log's head and `open_streams` then agree, for a cut."""
        async with self._turnstile.alone():
            yield

    def open_streams(self) -> dict[StreamId, OpenCall]:
        """The streams whose request is a call by now."""
        return {
            stream: _open_call(attachment.claim, attachment.answer.recording.attempt)
            for stream, attachment in self._open.items()
        }

    def waiting(self) -> Waiting | None:
        """What the agent waits for, if that is all it does."""
        answers = tuple(attachment.answer for attachment in self._open.values())
        if self._beginning or not self.idleness.all_wait(answers):
            return None
        due_ns = self._waits.due_ns([answer.call.call_id for answer in answers])
        return Waiting(answers=answers, due_ns=due_ns, for_others=self.fetching)

    def pump_alive(self, call_id: CallId) -> bool:
        return self._pumps.alive(call_id)

    @property
    def fetching(self) -> bool:
        """Whether an answer is on its way to this node, which is lost if the node goes."""
        return self._pumps.fetching

    async def until_still(self) -> None:
        """Wait until it is not."""
        await self._pumps.until_still()

    def pending_redo(self) -> tuple[CallId, ...]:
        """Calls that the agent is expected to make again: a checkpoint keeps them."""
        return self._redo.pending

    def joinable(self) -> tuple[CallId, ...]:
        """Calls that an equal request would join: a checkpoint keeps them."""
        return self._redo.joinable

    async def _receive(self, stream: Stream, incarnation: int) -> Attachment | LocalAnswer | None:
        """Read a request and decide what answers it. Its bytes are gone from here when this returns."""
        async with AsyncExitStack() as reserved:
            taken_in = await take_in(stream, self._routing, self._room, reserved)
            return await self._claim(stream, taken_in, incarnation) if isinstance(taken_in, Intake) else taken_in

    async def _claim(self, stream: Stream, intake: Intake, incarnation: int) -> Attachment:
        """Decide which call answers a request, record that, and acknowledge the request."""
        await self._pumps.ready()
        await self._settle(intake)
        while True:
            await self._pumps.room()
            async with self._turnstile.turn() as turn:
                concerns_others = self._concerns_others(intake)
                if concerns_others:
                    await turn.alone()
                self._check_current(stream, incarnation)
                if stream.closed is not None:
                    raise StreamGone(stream.id, "its client left before its turn came")
                if self._pumps.full:
                    continue
                if not concerns_others:
                    return await self._begin(stream, intake, incarnation, turn)
                if self._crossroads.open or not self._leaves_path(intake):
                    attachment = await self._attach(stream, intake, incarnation)
                    if attachment is not None:
                        return attachment
                    continue
            await self._crossroads.hold(stream, f"{intake.request.line.method} {intake.request.line.target}"[:200])

    def _concerns_others(self, intake: Intake) -> bool:
        """Whether what answers a request depends on how another decision ends, or the other way round.

        It does not if the request can be nothing but a new call: no call is awaited or offered for it, it carries no
        note, and no client of an equal one has left, or may have. Equal requests at once are calls of their own.
        """
        if self._redo.pending or self._to_tell is not None or self._redo.offers(intake.key):
            return True
        logical = intake.key.logical
        if any(attachment.may_have_left(intake) for attachment in self._open.values()):
            return True
        return any(one.has_left and one.logical == logical for one in self._beginning.values())

    async def _begin(self, stream: Stream, intake: Intake, incarnation: int, turn: Turn) -> Attachment:
        """A call that is new whatever else is decided meanwhile."""
        number = stream_id(stream)
        self._beginning[number] = Beginning(stream=stream, logical=intake.key.logical)
        turn.step_aside()
        try:
            attachment = await self._new_call(stream, intake, incarnation, ())
            self._hold(attachment)
        finally:
            del self._beginning[number]
        stream.acknowledge(intake.request.length)
        return attachment

    async def _attach(self, stream: Stream, intake: Intake, incarnation: int) -> Attachment | None:
        """None if the call that answers the request has lost its answer: from now on it answers nothing."""
        expected = self._redo.pending
        call_id = self._match(intake)
        if call_id is None:
            attachment = await self._new_call(stream, intake, incarnation, expected)
        else:
            kind = Kind.CALL_REPEATED if call_id in expected else Kind.CALL_JOINED
            attachment = await self._old_call(stream, intake, incarnation, call_id, kind)
            if attachment is None:
                await self._lose(stream, call_id, expected=call_id in expected)
                return None
        self._hold(attachment)
        stream.acknowledge(intake.request.length)
        return attachment

    def _leaves_path(self, intake: Intake) -> bool:
        joins = any(attachment.may_have_left(intake) for attachment in self._open.values())
        return not joins and self._redo.leaves_path(intake.key)

    async def _settle(self, intake: Intake) -> None:
        """Wait, not for long, until it is known how the client of an equal request left that is getting its answer."""
        for attachment in list(self._open.values()):
            if attachment.may_have_left(intake) and attachment.answer.complete:
                with suppress(TimeoutError):
                    async with asyncio.timeout(SETTLE_SECONDS):
                        await attachment.ended.wait()

    def _match(self, intake: Intake) -> CallId | None:
        """The call in the log that a request gets, among them those whose client has closed its end unanswered.

        TCP does not tell a client that left from one that only ended its request until bytes are sent to it, and a
        client that timed out before the first byte would be paid for twice. Clients that wait for an answer on a
        connection that they half closed are rare; if one asks twice at once, both get the one answer.
        """
        left = [
            attachment.answer.call
            for attachment in self._open.values()
            if attachment.may_have_left(intake)
            and not attachment.answer.complete
            and end_of_stream(StreamEnd.GONE, attachment.status) is StreamEnd.GONE
            and self._holds(attachment.claim.stream, attachment.claim.call_id)
        ]
        for call in left:
            self._redo.ended(call.call_id, StreamEnd.GONE)
        found = self._redo.match(intake.key)
        for call in left:
            if call.call_id != found:
                self._redo.attach(entry_of(call))
        return found

    async def _new_call(
        self, stream: Stream, intake: Intake, incarnation: int, expected: tuple[CallId, ...]
    ) -> Attachment:
        call_id = self._recorder.new_call_id()
        left = None
        if expected:
            policy = self._crossroads.policy
            orphaned = [orphan for orphan in self._redo.orphans if orphan in expected]
            left = Departure(pending=expected, orphaned=orphaned, policy=policy)
            if policy is OnDivergence.TELL:
                self._to_tell = await self._recorder.note_about(left.orphaned)
        note = self._to_tell if intake.may_carry(self._to_tell) else None

        def intend(usage_asked: bool) -> Awaitable[Call]:
            return self._recorder.intend(
                intake.new_call(call_id, stream_id(stream), incarnation),
                head=intake.head,
                body=intake.prepared,
                at_once=intake.at_once,
                usage_asked=usage_asked,
                left=left,
                note=note,
            )

        answer = await self._pumps.begin(intake, intend, note=note)
        if note is not None:
            self._to_tell = None
        self._tree.hang(answer.call.intended_seq)
        self._redo.attach(entry_of(answer.call))
        claim = intake.claim(call_id, stream_id(stream), incarnation)
        return Attachment(stream=stream, claim=claim, answer=answer)

    async def _old_call(
        self, stream: Stream, intake: Intake, incarnation: int, call_id: CallId, kind: Kind
    ) -> Attachment | None:
        answer = await self._pumps.revive(call_id, announce=True)
        if answer is None:
            return None
        claim = intake.claim(call_id, stream_id(stream), incarnation, intake.shape_for(answer.call.key))
        self._tree.reach(answer.call.intended_seq)
        attempt = answer.recording.attempt
        await self._recorder.attach(kind, claim, cursor_seq=self._tree.cursor, attempt=attempt)
        return Attachment(stream=stream, claim=claim, answer=answer)

    async def _lose(self, stream: Stream, call_id: CallId, *, expected: bool) -> None:
        """An answer in the log is damaged. The call is made anew, unless that would do something twice."""
        call = await self._recorder.load(call_id)
        self._redo.lost(call_id, expected=expected)
        if not call.may_be_sent_again:
            stream.reset()
            raise StreamGone(stream.id, "its answer is damaged")

    async def _reattach(
        self, stream: Stream, open_stream: OpenStream, call_id: CallId, incarnation: int
    ) -> Attachment | None:
        await self._pumps.ready()
        async with self._turnstile.alone():
            self._check_current(stream, incarnation)
            # The cut that a restored stream comes from is younger than a cut made now would be worth.
            answer = await self._pumps.revive(call_id, announce=False)
            if answer is None:
                return None
            shape, hide_usage = await self._recorder.load_form(call_id, open_stream.stream)
            claim = Claim(
                call_id=call_id,
                stream=open_stream.stream,
                incarnation=incarnation,
                request_bytes=open_stream.read,
                continued=open_stream.untouched_bytes > 0,
                shape=shape,
                hide_usage=hide_usage,
            )
            attachment = Attachment(stream=stream, claim=claim, answer=answer)
            await self._recorder.inherit(claim, attempt=answer.recording.attempt)
            self._hold(attachment)
            stream.acknowledge(stream.received)
            return attachment

    async def _attend(self, stream: Stream, attachment: Attachment) -> None:
        """Deliver to a stream until it ends, and record how."""
        claim, answer = attachment.claim, attachment.answer
        dialect = dialect_named(answer.call.dialect)
        rows = rows_in_shape(answer.recording, dialect, claim.shape, hide_usage=claim.hide_usage)
        end = await deliver(stream, rows, continued=claim.continued, released=answer.released)
        if end is not None:
            await self._detach(stream, claim.stream, claim.call_id, claim.incarnation, end)

    async def _detach(
        self, stream: Stream, number: StreamId, call_id: CallId, incarnation: int, end: StreamEnd
    ) -> None:
        async with self._turnstile.turn() as turn:
            if incarnation != self._incarnation:
                return
            attachment = self._open.get(number)
            end = end_of_stream(end, attachment.status if attachment is not None else None)
            data = {"stream": number, "end": end.value, "taken_bytes": stream.taken}
            if attachment is not None:
                turn.step_aside()  # an equal request sees in `_open` that this client left, and waits
            await self._recorder.deliver(incarnation, call_id, data)
            stream.forget()
            if attachment is not None:
                del self._open[number]
                self.idleness.move()
                attachment.ended.set()
            if self._holds(number, call_id):
                self._redo.ended(call_id, end)

    def _hold(self, attachment: Attachment) -> None:
        claim = attachment.claim
        self._open[claim.stream] = attachment
        self.idleness.move()
        self._holders[claim.call_id] = claim.stream

    def _holds(self, stream: StreamId, call_id: CallId) -> bool:
        """Whether a stream is the last that got this call: the end of an earlier one no longer counts."""
        return self._holders.get(call_id, stream) == stream

    async def _break_off(self, stream: Stream, open_stream: OpenStream, call_id: CallId, incarnation: int) -> None:
        """The agent holds a part of an answer that can't be continued: it learns that, and may ask again."""
        data = {"stream": open_stream.stream, "taken_bytes": open_stream.taken, "attempt": open_stream.attempt}
        async with self._turnstile.turn():
            await self._recorder.note(Kind.STREAM_RESET, incarnation, call_id, data)
        stream.reset()
        await closed(stream)
        await self._detach(stream, open_stream.stream, call_id, incarnation, StreamEnd.RESET)

    def _failed(self, call_id: CallId) -> None:
        """An equal request is a new call from now on, whichever incarnation makes it."""
        self._redo.failed(call_id)

    def _check_current(self, stream: Stream, incarnation: int) -> None:
        if incarnation != self._incarnation:
            stream.reset()
            raise StreamGone(stream.id, "its sandbox was replaced")


async def _let_go(stream: Stream) -> None:
    """See a stream that has no call to its end."""
    if await closed(stream) is not None:
        stream.forget()


def stream_id(stream: Stream) -> StreamId:
    return StreamId(stream.id)


def _open_call(claim: Claim, attempt: int) -> OpenCall:
    untouched = untouched_bytes(None, continued=claim.continued)
    return OpenCall(call_id=claim.call_id, attempt=attempt, untouched_bytes=untouched)
