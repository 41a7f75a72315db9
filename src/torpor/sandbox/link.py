"""The host end of the init protocol (docs/init-protocol.md): one sandbox's link to this node.

Owns the handshake, the start and restore of the agent, the cut, the exit and the list of streams. A guest
that lies, is gone or does not answer is SandboxFailed: "link_protocol", "link_lost", "link_silent". All that
waits for the guest needs `run` to be running.
"""

import asyncio
import logging
import os
import secrets
import struct
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from torpor.core.clock import Clock
from torpor.core.errors import Conflict, InvalidInput, SandboxFailed
from torpor.sandbox.fifos import Fifos, Pulse
from torpor.sandbox.frames import (
    FIRST_CALL_STREAM,
    FIRST_WORKER_STREAM,
    NONCE_BYTES,
    PAYLOAD_BYTES_MAX,
    PROTOCOL_VERSION,
    STDERR,
    STDOUT,
    STREAMS_MAX,
    AgentSpec,
    Frame,
    FrameReader,
    FromGuest,
    GuestStatus,
    Phase,
    StreamStatus,
    ToGuest,
    pack_life,
    pack_spec,
    parse_status,
    violation,
)
from torpor.sandbox.streams import Stream
from torpor.sandbox.workers import check_can_work

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_UNFORGOTTEN_MAX = 4 * STREAMS_MAX
"""Closed streams whose end the owner has not recorded yet count here only."""
_OF_A_STREAM = frozenset({FromGuest.DATA, FromGuest.FIN, FromGuest.CLOSED, FromGuest.TAKEN})
_WAIT_STATUS = struct.Struct("<i")
_LOG_LINES_MAX = 1000
_LOG_CHARACTERS_MAX = 1000


class Link:
    """One link, from HELLO to `close`; a second one on the same FIFOs adopts the sandbox.

    Attributes:
        status: what the guest said of itself in answer to HELLO.
    """

    status: GuestStatus

    def __init__(
        self, fifos: Fifos, nonce: bytes, clock: Clock, *, heartbeat_seconds: float, silence_seconds: float
    ) -> None:
        self._fifos = fifos
        self._reader = FrameReader(nonce)
        self._clock = clock
        self._heartbeat_seconds = heartbeat_seconds
        self._silence_seconds = silence_seconds
        self._heard = clock.monotonic()
        self._greeted = False
        self._ended: SandboxFailed | None = None
        self._changed = Pulse()
        self._streams: dict[int, Stream] = {}
        self._unclaimed: dict[int, StreamStatus] = {}
        self._last_stream = FIRST_CALL_STREAM - 1
        self._next_worker = FIRST_WORKER_STREAM
        self._opened: deque[Stream] = deque()
        self._outputs: dict[int, Stream] = {}
        self._started: tuple[int, str] | None = None
        self._alive: int | None = None
        self._wait_status: int | None = None
        self._exit_acknowledged = False
        self._cutting = asyncio.Lock()
        self._barrier = 0
        self._barrier_status: GuestStatus | None = None
        self._log_lines = 0
        self._handlers: dict[int, Callable[[Frame], None]] = {
            FromGuest.STATUS: self._on_status,
            FromGuest.OPEN: self._on_open,
            FromGuest.DATA: self._on_stream,
            FromGuest.FIN: self._on_stream,
            FromGuest.CLOSED: self._on_stream,
            FromGuest.TAKEN: self._on_stream,
            FromGuest.BARRIER_ACK: self._on_barrier_ack,
            FromGuest.ALIVE: self._on_alive,
            FromGuest.EXIT: self._on_exit,
            FromGuest.LOG: self._on_log,
            FromGuest.STARTED: self._on_started,
        }

    @classmethod
    async def open(
        cls,
        *,
        to_guest: Path,
        from_guest: Path,
        clock: Clock,
        deadline_seconds: float = 10,
        heartbeat_seconds: float = 5,
        silence_seconds: float = 30,
    ) -> "Link":
        """Open the host's ends of both FIFOs and greet the guest.

        Raises:
            SandboxFailed: no guest opened its ends or answered in time, it is gone, or it broke the protocol.
        """
        nonce = secrets.token_bytes(NONCE_BYTES)
        async with _deadline(deadline_seconds, "reach the sandbox's init"):
            try:
                fifos = await Fifos.open(to_guest=to_guest, from_guest=from_guest, nonce=nonce)
            except OSError as error:
                raise SandboxFailed(
                    "link_lost", f"cannot open the sandbox's FIFOs: {error.strerror} ({error.filename})"
                ) from error
            link = cls(fifos, nonce, clock, heartbeat_seconds=heartbeat_seconds, silence_seconds=silence_seconds)
            try:
                fifos.post(ToGuest.HELLO, arg=PROTOCOL_VERSION)
                while not link._greeted:
                    link._handle(await fifos.read())
            except BaseException:
                link.close()
                raise
        return link

    async def run(self) -> None:
        """Read what the guest says, and notice its silence; the owner runs this in its TaskGroup.

        Returns when `close` was called, or when the guest ended after `acknowledge_exit`.

        Raises:
            SandboxFailed: link_lost, link_protocol or link_silent; whoever else waits gets the same.
        """
        self._heard = looked = self._clock.monotonic()
        try:
            while self._ended is None:
                await self._listen()
                before, looked = looked, self._clock.monotonic()
                self._check_silence(before, looked)
        except SandboxFailed as failure:
            if self._ended is None:
                self._end(failure)
                raise
        finally:
            self.close()

    async def start(
        self,
        spec: AgentSpec,
        *,
        incarnation: int,
        wall_ns: int,
        entropy: bytes,
        deadline_seconds: float = 30,
    ) -> None:
        """Start the agent's main process; then `stdout` and `stderr` are there.

        Raises:
            InvalidInput: ("agent_cannot_start") its command can't be run.
            Conflict: this sandbox's agent was started before.
        """
        if self.status.phase not in (Phase.WAITING, Phase.COULD_NOT_START):
            raise Conflict("agent_started_before", "cannot start the agent: its sandbox started it before")
        packed = pack_spec(spec)
        life = pack_life(incarnation, wall_ns, entropy)
        async with _deadline(deadline_seconds, "start the agent"):
            for offset in range(0, len(packed), PAYLOAD_BYTES_MAX):
                await self._fifos.room()
                self._fifos.post(ToGuest.SPEC, arg=offset, payload=packed[offset : offset + PAYLOAD_BYTES_MAX])
            for number in (STDOUT, STDERR):
                self._outputs[number] = self._add(number, port=0)
            self._started = None
            self._fifos.post(ToGuest.START, arg=len(packed), payload=life)
            code, text = await self._until(lambda: self._started)
        if code:
            raise _could_not_start(spec.arguments[0], code, text)

    async def restored(
        self,
        *,
        incarnation: int,
        wall_ns: int,
        slept_ns: int,
        entropy: bytes,
        environment: Mapping[str, str],
        deadline_seconds: float,
    ) -> None:
        """Tell the guest that it was restored; returns when it is alive. Nothing is delivered before.

        Raises:
            SandboxFailed: no sign of life by the deadline: destroy the sandbox.
        """
        life = pack_life(wall_ns, slept_ns, entropy, environment)
        self._fifos.deliver(False)
        self._fifos.post(ToGuest.RESTORED, arg=incarnation, payload=life)
        async with _deadline(deadline_seconds, "bring the restored agent to life"):
            await self._until(lambda: True if self._alive == incarnation else None)
        self._fifos.deliver(True)

    async def accept(self) -> Stream:
        """The next connection of the agent, in the order of their opening."""
        return await self._until(lambda: self._opened.popleft() if self._opened else None)

    def inherit(self, stream: int, *, position: int, acknowledged: int) -> Stream:
        """Go on with a stream that `status` lists: its request from `position` on, its response from V on.

        Args:
            position: bytes of the request (or output) that this host has, at most the guest's R.
            acknowledged: of these, the durable ones.
        """
        status = self._claim(stream)
        if position > status.read:
            raise violation(f"it forgot bytes of stream {stream}: {position} were received, it read {status.read}")
        inherited = self._add(stream, status.port)
        inherited.continue_from(status)
        inherited.resume(position=position, acknowledged=max(acknowledged, status.acknowledged))
        if status.kind == "output":
            self._outputs[stream] = inherited
        return inherited

    def inherit_output(self, number: int) -> Stream:
        """Go on with the agent's stdout or stderr behind what was acknowledged."""
        if number not in self._unclaimed:
            raise violation(f"it runs an agent without output stream {number}")
        position = self._unclaimed[number].acknowledged
        return self.inherit(number, position=position, acknowledged=position)

    def refuse(self, stream: int) -> None:
        """Reset a connection that `status` lists and nobody inherits."""
        self._claim(stream)
        self._fifos.post(ToGuest.RESET, stream)
        self._fifos.post(ToGuest.FORGET, stream)

    @property
    def stdout(self) -> Stream:
        return self._output(STDOUT)

    @property
    def stderr(self) -> Stream:
        return self._output(STDERR)

    async def cut(self, deadline_seconds: float) -> GuestStatus:
        """Hold the link still: both FIFOs are empty and stay so until `release`. A second cut waits for it.

        When this raises, or is cancelled, the link goes on as before.

        Raises:
            SandboxFailed: ("link_silent") the guest did not answer in time, or the link ended.
        """
        async with _deadline(deadline_seconds, "hold the sandbox still"):
            await self._cutting.acquire()
            try:
                self._barrier += 1
                self._barrier_status = None
                self._fifos.post(ToGuest.BARRIER, arg=self._barrier)
                self._fifos.hold()
                return await self._until(lambda: self._barrier_status)
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """End the cut: delivery goes on."""
        if not self._cutting.locked():
            raise RuntimeError("no cut is to be released")
        self._barrier_status = None
        self._heard = self._clock.monotonic()
        self._fifos.unhold(ToGuest.RELEASE, self._barrier)
        self._cutting.release()

    async def signal(self, number: int, request_id: int) -> None:
        """Send a signal to the agent's process group; the guest obeys each request id once."""
        await self._fifos.room()
        if self._ended is not None:
            raise self._ended
        self._fifos.post(ToGuest.SIGNAL, number, request_id)

    async def work(self, worker: str, request_id: int) -> Stream:
        """Start a worker of init; the stream is its socket, and ends with this link.

        Args:
            request_id: init starts a worker once for each, and remembers the last 64.

        Raises:
            Conflict: as `check_can_work`.
            SandboxFailed: the link ended.
        """
        check_can_work(self.status.version, self.works)
        await self._fifos.room()
        if self._ended is not None:
            raise self._ended
        stream = self._add(self._next_worker, port=0)
        self._next_worker += 1
        self._fifos.post(ToGuest.WORK, stream.id, request_id, worker.encode())
        return stream

    @property
    def works(self) -> int:
        """How many workers have streams."""
        return sum(stream.kind == "worker" for stream in self._streams.values())

    async def wait_exit(self) -> int:
        """The raw wait status of the agent's main process, once it ended."""
        return await self._until(lambda: self._wait_status)

    def acknowledge_exit(self) -> None:
        """Let the guest end: its exit status is durable here."""
        self._exit_acknowledged = True
        self._fifos.post(ToGuest.EXIT_ACK)

    def close(self) -> None:
        """Leave the sandbox to the next link; streams and waiting methods raise."""
        self._end(SandboxFailed("link_closed", "cannot use the link to the sandbox: this node closed it"))

    async def _listen(self) -> None:
        try:
            async with asyncio.timeout(self._heartbeat_seconds):
                data = await self._fifos.read()
        except TimeoutError:
            if not self._cutting.locked():
                self._fifos.post(ToGuest.PING)
            return
        if self._ended is None:
            self._handle(data)

    def _handle(self, data: bytes) -> None:
        if not data:
            if not self._exit_acknowledged:
                raise SandboxFailed("link_lost", "cannot go on with the sandbox: its init is gone")
            self.close()
            return
        of_the_link = False
        for frame in self._reader.feed(data):
            if self._barrier_status is not None:
                raise violation(f"a frame of type {frame.type:#x} passed during a cut")
            self._heard = self._clock.monotonic()
            handler = self._handlers.get(frame.type)
            if handler is not None:
                handler(frame)
                # Who waits for a stream waits at the stream.
                of_the_link |= frame.type not in _OF_A_STREAM
        if of_the_link:
            self._changed.fire()

    def _check_silence(self, before: float, now: float) -> None:
        stalled = now - before > 2 * self._heartbeat_seconds
        if stalled or self._cutting.locked():
            # A node that did not look, or told the guest to be still, can't call it silent.
            self._heard = now
        elif now - self._heard > self._silence_seconds:
            raise SandboxFailed(
                "link_silent",
                f"cannot go on with the sandbox: its init was silent for {now - self._heard:.0f} s",
            )

    def _on_status(self, frame: Frame) -> None:
        if self._greeted:
            raise violation("it greets twice")
        self.status = parse_status(frame.payload)
        self._unclaimed = {stream.stream: stream for stream in self.status.streams}
        self._last_stream = self.status.next_stream - 1
        if self.status.phase is Phase.EXITED:
            self._wait_status = self.status.wait_status
        self._greeted = True

    def _on_open(self, frame: Frame) -> None:
        if not self._last_stream < frame.stream:
            raise violation(f"it opens stream {frame.stream} after stream {self._last_stream}")
        if frame.arg > 65_535:
            raise violation(f"it opens stream {frame.stream} on port {frame.arg}")
        calls = [stream for stream in self._streams.values() if stream.kind == "call" and stream.closed is None]
        unclaimed = [stream for stream in self._unclaimed.values() if stream.kind == "call"]
        if len(calls) + len(unclaimed) >= STREAMS_MAX or len(self._streams) > _UNFORGOTTEN_MAX:
            raise violation(f"it opens more than {STREAMS_MAX} streams")
        self._last_stream = frame.stream
        self._opened.append(self._add(frame.stream, frame.arg))

    def _on_stream(self, frame: Frame) -> None:
        stream = self._streams.get(frame.stream)
        if stream is not None:
            stream.handle(frame.type, frame.arg, frame.payload)
        elif FIRST_WORKER_STREAM <= frame.stream < self._next_worker:
            return  # It was forgotten, and this was on its way.
        elif frame.stream in self._unclaimed or not FIRST_CALL_STREAM <= frame.stream <= self._last_stream:
            raise violation(f"it speaks of stream {frame.stream}, which is not open")

    def _on_barrier_ack(self, frame: Frame) -> None:
        if frame.arg > self._barrier:
            raise violation(f"it answers barrier {frame.arg}, the last was {self._barrier}")
        if frame.arg != self._barrier or not self._cutting.locked():
            return  # The answer to a cut that was given up.
        status = parse_status(frame.payload)
        for stream in status.streams:
            known = self._streams.get(stream.stream)
            if known is not None:
                known.check(stream)
        self._barrier_status = status

    def _on_alive(self, frame: Frame) -> None:
        self._alive = frame.arg

    def _on_started(self, frame: Frame) -> None:
        self._started = (frame.arg, _printable(frame.payload))

    def _on_exit(self, frame: Frame) -> None:
        if len(frame.payload) != _WAIT_STATUS.size:
            raise violation(f"its exit status has {len(frame.payload)} bytes")
        if self._wait_status is None:
            self._wait_status = _WAIT_STATUS.unpack(frame.payload)[0]

    def _on_log(self, frame: Frame) -> None:
        self._log_lines += 1
        if self._log_lines <= _LOG_LINES_MAX:
            logger.info("init says: %s", _printable(frame.payload))
        if self._log_lines == _LOG_LINES_MAX:
            logger.warning("init said %d lines; the rest is dropped", _LOG_LINES_MAX)

    def _add(self, number: int, port: int) -> Stream:
        kind = "output" if number < FIRST_CALL_STREAM else "call" if number < FIRST_WORKER_STREAM else "worker"
        stream = Stream(number=number, port=port, kind=kind, fifos=self._fifos, forget=self._forget)
        self._streams[number] = stream
        return stream

    def _forget(self, stream: Stream) -> None:
        if self._streams.get(stream.id) is not stream:
            return
        del self._streams[stream.id]
        self._fifos.post(ToGuest.FORGET, stream.id)

    def _claim(self, stream: int) -> StreamStatus:
        if stream not in self._unclaimed:
            raise ValueError(f"stream {stream} is not listed in the status, or was claimed before")
        return self._unclaimed.pop(stream)

    def _output(self, number: int) -> Stream:
        if number not in self._outputs:
            raise RuntimeError("the agent's output is there after `start` or `inherit`")
        return self._outputs[number]

    async def _until(self, ready: Callable[[], _T | None]) -> _T:
        while (value := ready()) is None:
            if self._ended is not None:
                raise self._ended
            await self._changed.wait()
        return value

    def _end(self, reason: SandboxFailed) -> None:
        if self._ended is not None:
            return
        self._ended = reason
        self._fifos.close()
        for stream in self._streams.values():
            stream.end()
        self._changed.fire()


@asynccontextmanager
async def _deadline(seconds: float, purpose: str) -> AsyncGenerator[None, None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise SandboxFailed("link_silent", f"cannot {purpose}: its init did not answer within {seconds:g} s") from error


def _printable(payload: bytes) -> str:
    text = payload[: 4 * _LOG_CHARACTERS_MAX].decode("utf-8", "replace")[:_LOG_CHARACTERS_MAX]
    return "".join(character if character.isprintable() else "?" for character in text)


def _could_not_start(command: str, code: int, text: str) -> InvalidInput:
    name, hint = _START_ERRORS.get(code, (os.strerror(min(code, 4095)), ""))
    detail = f" ({text})" if text else ""
    return InvalidInput("agent_cannot_start", f"cannot start the agent {command!r}: {name}{detail}", hint=hint)


_START_ERRORS: dict[int, tuple[str, str]] = {
    2: ("no such command in the sandbox", "Is it installed in the session's image, and on its PATH?"),
    8: ("it is not a program", "A script needs a first line like `#!/usr/bin/env python3`."),
    12: ("the sandbox has no memory for it", "Raise the session's memory limit."),
    13: ("it is not executable", "Set its executable bit: chmod +x."),
    7: ("its arguments and environment are too long", "Put large values in a file of the workspace."),
    20: ("a part of its path is no directory", "Look at the command's path and at the working directory."),
}
