"""The answers of a session's calls: those that are arriving, which outlive every stream, and those in the log.

Owns the tasks of all pumps. When a model call is on its way the runtime is told once, and no stream gets a byte of the
answer before it is done with that: the agent is blocked anyway, so it is the moment for a checkpoint.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torpor.core.call import Call, CallState, ResponseHead
from torpor.core.clock import Clock
from torpor.core.errors import Conflict, Damaged, TorporError
from torpor.core.ids import CallId
from torpor.gateway.billing import Billing
from torpor.gateway.connections import Lease
from torpor.gateway.delivery import Recording
from torpor.gateway.dialects import OWN
from torpor.gateway.failure import NoAnswer
from torpor.gateway.intake import Intake, from_log
from torpor.gateway.own import CheckpointFor, OwnPump
from torpor.gateway.pump import Pump
from torpor.gateway.record import Recorder, needs_sending
from torpor.gateway.routing import Routing, choose
from torpor.gateway.sending import Sending, sending_of
from torpor.gateway.upstream import UpstreamClient
from torpor.gateway.waits import Waits
from torpor.sandbox.fifos import Pulse

PUMPS_MAX = 512
"""Answers that are fetched at one time: twice the connections that a sandbox can have."""
REQUESTS_BYTES_MAX = 256 << 20
"""Bodies of the requests whose answers are fetched, beyond which the next call waits."""

_UNREAD = frozenset({"block_redacted", "block_damaged", "request_damaged"})
"""Why a logged request can't be sent again."""

FirstByteAt = Callable[[], float | None]
"""When the first byte of a call's answer was ready, by the monotonic clock; None as long as it is not."""
OnCall = Callable[[CallId, FirstByteAt], Awaitable[None]]
Intend = Callable[[bool], Awaitable[Call]]
"""Records a call; told whether what is sent asks for token counts that its client does not ask for."""


@dataclass(slots=True)
class _Held:
    """An answer that is not delivered before the runtime is done with its call."""

    released: asyncio.Event = field(default_factory=asyncio.Event)
    first_byte_at: float | None = None

    def note_first_byte(self, clock: Clock) -> None:
        self.first_byte_at = clock.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A call with the rows of its answer, as far as they are written.

    Attributes:
        released: set when they may be delivered.
    """

    call: Call
    recording: Recording
    released: asyncio.Event

    @property
    def complete(self) -> bool:
        """All of it is there and may be delivered, so a stream that gets it ends by itself before long."""
        return self.recording.finished is not None and self.released.is_set()


class Pumps:
    """Every pump of one session on this node; `run` it in a TaskGroup."""

    def __init__(
        self,
        *,
        recorder: Recorder,
        upstreams: UpstreamClient,
        billing: Billing,
        routing: Routing,
        on_call: OnCall,
        on_failed: Callable[[CallId], None],
        waits: Waits,
        checkpoint_for: CheckpointFor,
    ) -> None:
        self._recorder = recorder
        self._upstreams = upstreams
        self._billing = billing
        self._warm = False
        self._routing = routing
        self._on_call = on_call
        self._on_failed = on_failed
        self._waits = waits
        self._checkpoint_for = checkpoint_for
        self._group: asyncio.TaskGroup | None = None
        self._running = asyncio.Event()
        self._closing = asyncio.Event()
        self._ended = Pulse()
        self._pumps: dict[CallId, Pump | OwnPump] = {}
        self._beginning: dict[asyncio.Future[Answer], bytes] = {}
        self._held: dict[CallId, _Held] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Own the tasks until `close`.

        Raises:
            ExceptionGroup: a pump could not write the log (Superseded, or the database's own failures).
        """
        async with self._upstreams, asyncio.TaskGroup() as group:
            self._group = group
            self._running.set()
            await self._closing.wait()
            for task in self._tasks:
                task.cancel()

    def close(self) -> None:
        """Abandon what is arriving: those calls are torn for the next owner."""
        self._closing.set()

    def alive(self, call_id: CallId) -> bool:
        """Whether an answer is arriving here."""
        return call_id in self._pumps

    @property
    def fetching(self) -> bool:
        """Whether an answer is arriving from elsewhere, which ends if this node does: not one that a budget holds."""
        return bool(self._beginning) or any(isinstance(pump, Pump) and not pump.held for pump in self._pumps.values())

    async def until_still(self) -> None:
        """Wait until nothing is arriving from elsewhere."""
        while self.fetching:
            await self._ended.wait()

    async def room(self) -> None:
        """Wait until one more answer may be fetched: pumps outlive their streams, and hold their requests."""
        while self.full:
            await self._ended.wait()

    @property
    def full(self) -> bool:
        held_bytes = sum(pump.request_bytes for pump in self._pumps.values())
        held_bytes += sum(map(len, self._beginning.values()))
        return len(self._pumps) + len(self._beginning) >= PUMPS_MAX or held_bytes > REQUESTS_BYTES_MAX

    async def ready(self) -> None:
        """Wait until `run` runs."""
        await self._running.wait()

    async def begin(self, intake: Intake, intend: Intend, *, note: str | None) -> Answer:
        """Record a new call, and send it; `note` goes with it (`agent.told`).

        Both belong to a task of its own: if the stream that asked goes away meanwhile, a call that the log has as sent
        is sent all the same. This returns, or lets itself be cancelled, only when the log has it.
        """
        begun: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._beginning[begun] = intake.request.body
        begun.add_done_callback(self._beginning.pop)
        task = self._spawn(self._begin(intake, intend, note, begun))
        task.add_done_callback(lambda _: begun.cancel())  # it may end before it began
        return await _settled(begun)

    async def _begin(self, intake: Intake, intend: Intend, note: str | None, begun: asyncio.Future[Answer]) -> None:
        # A connection takes as long as the disk, and carries nothing of the request before it may leave.
        reached = self._reach(intake)
        try:
            sending = sending_of(intake, note, self._upstreams)
            call = await intend(sending.usage_asked)
        except BaseException as error:
            if reached is not None:
                reached.end()
            if isinstance(error, Exception):
                begun.set_exception(error)
                return
            raise
        if reached is not None and call.state is not CallState.SENT:
            reached.end()
            reached = None
        pump = self._enter(call, sending, announce=True, reached=reached)
        begun.set_result(self._answer(call, pump.recording))
        await self._run(pump)

    def _reach(self, intake: Intake) -> Lease | None:
        if not intake.at_once:
            return None
        try:
            return self._upstreams.reach(choose(intake.destination, intake.model))
        except NoAnswer:
            return None  # The pump will say so.

    def _start(self, call: Call, intake: Intake, *, announce: bool, note: str | None) -> Answer:
        """Send a call that is in the log, or send it again, as its next attempt; `note` goes with it (`agent.told`)."""
        pump = self._enter(call, sending_of(intake, note, self._upstreams), announce=announce)
        self._spawn(self._run(pump))
        return self._answer(call, pump.recording)

    def _enter(self, call: Call, sending: Sending, *, announce: bool, reached: Lease | None = None) -> Pump | OwnPump:
        pump = self._pump(call, sending, reached)
        self._pumps[call.call_id] = pump
        if call.is_llm and not self._warm:
            self._warm = True
            self._spawn(self._billing.warm(call))
        if announce and call.is_llm and isinstance(pump, Pump):
            held = self._held[call.call_id] = _Held()
            pump.recording.on_head = partial(held.note_first_byte, self._recorder.clock)
            self._spawn(self._announce(pump, held))
        return pump

    def _pump(self, call: Call, sending: Sending, reached: Lease | None) -> Pump | OwnPump:
        recorder, intake = self._recorder, sending.intake
        if intake.destination.dialect is OWN:
            return OwnPump(
                call=call,
                request=intake.request,
                recorder=recorder,
                waits=self._waits,
                checkpoint_for=self._checkpoint_for,
            )
        return Pump(
            call=call,
            sending=sending,
            recorder=recorder,
            billing=self._billing,
            upstreams=self._upstreams,
            reached=reached,
        )

    async def revive(self, call_id: CallId, *, announce: bool) -> Answer | None:
        """The answer of a call that is in the log: arriving, written, or that of a new attempt. None: it is damaged."""
        pump = self._pumps.get(call_id)
        if pump is not None:
            return self._answer(pump.call, pump.recording)
        call = await self._recorder.load(call_id)
        if needs_sending(call):
            try:
                head, body = await self._recorder.load_request(call_id)
                note = await self._recorder.load_note(call_id)
            except (Conflict, Damaged) as unread:
                if unread.code not in _UNREAD:
                    raise
                code = "request_redacted" if unread.code == "block_redacted" else "request_damaged"
                return await self._fail_unread(call, code, unread)
            intake = from_log(head, body, self._routing, dialect=call.dialect, is_llm=call.is_llm)
            return self._start(call, intake, announce=announce, note=note)
        try:
            return self._answer(call, await self._recorder.replay(call))
        except Damaged as damaged:
            if damaged.code != "answer_damaged":
                raise
            return None

    async def _fail_unread(self, call: Call, code: str, reason: TorporError) -> Answer:
        """A request, or its note, that was redacted or damaged can't be sent again; its client is told that it may."""
        said = {"error": {"type": "api_error", "code": code, "message": f"Torpor {reason}."}}
        headers = (("content-type", "application/json"), ("x-torpor-error", code), ("x-should-retry", "true"))
        head = ResponseHead(status=502, reason="Bad Gateway", headers=headers)
        response = (head, json.dumps(said).encode())
        failed = await self._recorder.fail(call.call_id, error=f"{code}: {reason}", response=response)
        self._on_failed(call.call_id)
        return self._answer(failed, await self._recorder.replay(failed))

    def _answer(self, call: Call, recording: Recording) -> Answer:
        held = self._held.get(call.call_id)
        if held is None:
            held = _Held()
            held.released.set()
        return Answer(call=call, recording=recording, released=held.released)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        assert self._group is not None, "`ready` was awaited"
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, pump: Pump | OwnPump) -> None:
        await pump.run()
        del self._pumps[pump.call.call_id]
        self._ended.fire()
        if pump.failed:
            self._on_failed(pump.call.call_id)
        await self._recorder.drop_chunks(pump.call.call_id, pump.recording)

    async def _announce(self, pump: Pump, held: _Held) -> None:
        await pump.under_way.wait()
        await self._on_call(pump.call.call_id, lambda: held.first_byte_at)
        del self._held[pump.call.call_id]
        held.released.set()


async def _settled(begun: "asyncio.Future[Answer]") -> Answer:
    """The result; a cancelled caller waits for it too."""
    try:
        return await asyncio.shield(begun)
    except asyncio.CancelledError:
        while not begun.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([begun])
        if not begun.cancelled():
            begun.exception()  # seen: what counts for the caller is that it was cancelled
        raise
