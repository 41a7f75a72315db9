"""One byte stream of the link: a connection of the agent, the agent's stdout or stderr, or the socket of a worker.

Owns a stream's positions and its receive buffer (at most WINDOW_BYTES). Checks every position that the guest
states against what was really exchanged: one that lies is SandboxFailed("link_protocol").
"""

import struct
from collections.abc import Callable

from torpor.core.errors import TorporError
from torpor.sandbox.fifos import Fifos, Pulse
from torpor.sandbox.frames import (
    PAYLOAD_BYTES_MAX,
    Closed,
    FromGuest,
    StreamKind,
    StreamStatus,
    ToGuest,
    violation,
)

WINDOW_BYTES = 262_144
_TAKEN = struct.Struct("<Q")


class StreamGone(TorporError):
    """Nothing more comes from or goes to this stream: an agent may hang up, and so may the link."""

    def __init__(self, stream: int, reason: str) -> None:
        super().__init__("stream_gone", f"cannot use stream {stream}: {reason}")


class Stream:
    """A stream. It ends by the client or by `reset`; link and guest know of it until `forget`.

    One task receives and one sends at a time.

    Attributes:
        id, port, kind: its number, the port that was connected to, "call", "output" or "worker".
        received: request (or output) bytes received so far.
        acknowledged: of these, what the guest was told to be durable.
        sent: response bytes handed to the link so far.
        taken, written: V and W, as the guest last reported them.
        half_closed: the client ended its request, and all of it was received.
        closed: how the stream ended; None while it has not.
    """

    def __init__(
        self, *, number: int, port: int, kind: StreamKind, fifos: Fifos, forget: Callable[["Stream"], None]
    ) -> None:
        self.id = number
        self.port = port
        self.kind: StreamKind = kind
        self.received = 0
        self.acknowledged = 0
        self.sent = 0
        self.taken = 0
        self.written = 0
        self.half_closed = False
        self._fifos = fifos
        self._forget = forget
        self._unread = bytearray()
        self._credit = WINDOW_BYTES
        self._finished = False
        self.closed: Closed | None = None
        self._was_reset = False
        self._link_over = False
        self._changed = Pulse()
        self._over = Pulse()

    def continue_from(self, status: StreamStatus) -> None:
        """Take over a stream that another link, or another life of the sandbox, began."""
        self.received = self.acknowledged = status.acknowledged
        self.sent = self.taken = status.taken
        self.written = status.written
        self._finished = status.fin_received
        self._credit = 0
        self.closed = status.closed

    def resume(self, *, position: int, acknowledged: int) -> None:
        """Ask for the bytes from `position` on, those below `acknowledged` being durable."""
        if not self.acknowledged <= acknowledged <= position:
            raise violation(f"stream {self.id} can't be resumed at {position}: {self.acknowledged} bytes are freed")
        self.received = position
        self.acknowledged = acknowledged
        if self.closed is not None:
            return  # Nothing more comes of it.
        self._credit = position + WINDOW_BYTES
        self._fifos.post(ToGuest.ACK, self.id, acknowledged)
        self._fifos.post(ToGuest.RESUME, self.id, position)
        self._fifos.post(ToGuest.CREDIT, self.id, self._credit)

    async def receive(self) -> bytes:
        """The next bytes in order, at most WINDOW_BYTES; empty once the client ended its request.

        Raises:
            StreamGone: the client went away before that, or the link ended.
        """
        while not self._unread:
            if self.half_closed and not self._link_over and self.closed is not Closed.RESET:
                return b""
            self._check_open()
            await self._changed.wait()
        data = bytes(self._unread)
        self._unread.clear()
        self._raise_credit()
        return data

    def acknowledge(self, position: int) -> None:
        """Say that the bytes below `position` are durable here: the guest frees them."""
        if position > self.received:
            raise ValueError(f"stream {self.id} has received {self.received} bytes, not {position}")
        if position > self.acknowledged:
            self.acknowledged = position
            if self.closed is None:
                self._fifos.post(ToGuest.ACK, self.id, position)

    async def send(self, offset: int, data: bytes) -> None:
        """Send response bytes from `offset` on, skipping what was sent before; returns when all are queued.

        Raises:
            StreamGone: the client went away, or the link ended.
        """
        if self.kind == "output" or self._finished or offset > self.sent:
            raise ValueError(f"stream {self.id} ({self.kind}) can't send from {offset}: it has sent {self.sent}")
        end = offset + len(data)
        while self.sent < end:
            room = await self._window()
            start = self.sent - offset
            piece = data[start : start + min(room, PAYLOAD_BYTES_MAX)]
            self._fifos.post(ToGuest.DATA, self.id, self.sent, piece)
            self.sent += len(piece)

    async def finish(self, length: int) -> None:
        """End the response cleanly: the client reads its end after `length` bytes.

        Raises:
            StreamGone: the client went away, or the link ended.
        """
        if self.kind != "call" or length != self.sent:
            raise ValueError(f"stream {self.id} ({self.kind}) can't end at {length}: it has sent {self.sent}")
        if self._finished:
            return
        await self._fifos.room()
        self._check_open()
        self._finished = True
        self._fifos.post(ToGuest.FIN, self.id, length)

    def reset(self) -> None:
        """Break the connection off: the client sees a reset, never a clean end."""
        if self.kind == "output":
            raise ValueError(f"stream {self.id} is output and can't be reset")
        if self.closed is None:
            self.closed = Closed.RESET
            self._was_reset = True
            self._unread.clear()
            self._fifos.post(ToGuest.RESET, self.id)
            self._changed.fire()
            self._over.fire()

    async def wait_closed(self) -> Closed:
        """Wait for the connection's end, which the guest tells again to every node until `forget`.

        Raises:
            StreamGone: the link ended first.
        """
        while self.closed is None:
            self._check_open()
            await self._over.wait()
        return self.closed

    def forget(self) -> None:
        """Let link and guest forget a closed stream: nobody will ask again how it ended, or the log says it durably."""
        if self.closed is None:
            raise ValueError(f"stream {self.id} is not closed")
        self._forget(self)

    def end(self) -> None:
        """The link is over."""
        self._link_over = True
        self._unread.clear()
        self._changed.fire()
        self._over.fire()

    def handle(self, kind: int, arg: int, payload: bytes) -> None:
        """Take one frame of the guest about this stream.

        Raises:
            SandboxFailed: ("link_protocol") it contradicts what was exchanged before.
        """
        if self._was_reset:
            return  # It was on its way.
        if self.closed is not None:
            raise violation(f"stream {self.id} was closed and went on")
        if kind == FromGuest.DATA:
            self._take_data(arg, payload)
        elif kind == FromGuest.FIN:
            self._take_end(arg)
        elif kind == FromGuest.TAKEN:
            self._take_positions(arg, payload)
        else:
            self._take_closed(arg, payload)
            self._over.fire()
        self._changed.fire()

    def check(self, status: StreamStatus) -> None:
        """Compare the guest's word at a barrier, when nothing is under way, with what was exchanged.

        Raises:
            SandboxFailed: ("link_protocol") they differ.
        """
        if self.closed is not None:
            return
        if status.sent != self.received or not self.written <= status.written <= status.taken <= self.sent:
            raise violation(f"the positions of stream {self.id} are not what was exchanged")

    def _take_data(self, offset: int, data: bytes) -> None:
        if self.half_closed or offset != self.received:
            raise violation(f"stream {self.id} sent byte {offset} after byte {self.received}")
        if offset + len(data) > self._credit:
            raise violation(f"stream {self.id} sent beyond its credit of {self._credit}")
        self._unread += data
        self.received += len(data)

    def _take_end(self, length: int) -> None:
        if length != self.received:
            raise violation(f"stream {self.id} ended at byte {length}, {self.received} came")
        self.half_closed = True

    def _take_positions(self, written: int, payload: bytes) -> None:
        if len(payload) != _TAKEN.size:
            raise violation(f"stream {self.id} reported its positions in {len(payload)} bytes")
        taken: int = _TAKEN.unpack(payload)[0]
        if not (self.written <= written <= taken <= self.sent and self.taken <= taken):
            raise violation(f"stream {self.id} took {taken} and wrote {written} of {self.sent} bytes")
        self.written = written
        self.taken = taken

    def _take_closed(self, written: int, payload: bytes) -> None:
        if payload not in (b"\1", b"\2", b"\3") or not self.written <= written <= self.sent:
            raise violation(f"stream {self.id} was closed at {written} of {self.sent} bytes as {payload[:8].hex()}")
        how = Closed(payload[0])
        if how is Closed.CONSUMED and not (self._finished and written == self.sent):
            raise violation(f"stream {self.id} claims to have consumed an answer that it did not get")
        self.written = written
        self.closed = how

    def _raise_credit(self) -> None:
        limit = self.received + WINDOW_BYTES
        # A quarter at a time: each byte read must not cost a frame.
        if limit - self._credit >= WINDOW_BYTES // 4 and self.closed is None and not self.half_closed:
            self._credit = limit
            self._fifos.post(ToGuest.CREDIT, self.id, limit)

    async def _window(self) -> int:
        """Wait for room at the guest, then in the queue; the number of bytes that the guest takes."""
        while True:
            self._check_open()
            if self.sent >= self.written + WINDOW_BYTES:
                await self._changed.wait()
                continue
            await self._fifos.room()
            self._check_open()
            return self.written + WINDOW_BYTES - self.sent

    def _check_open(self) -> None:
        if self.closed is Closed.RESET:
            raise StreamGone(self.id, "it was reset")
        if self.closed is not None:
            raise StreamGone(self.id, "the client closed it")
        if self._link_over:
            raise StreamGone(self.id, "the link to the sandbox ended")
