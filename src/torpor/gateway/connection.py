"""One connection to a provider: HTTP/1.1 by h11, one exchange at a time, nothing sent that was not asked for.

What arrives is parsed as it arrives and waits here until it is fetched; beyond ARRIVED_BYTES_MAX the provider has to
wait. How an exchange failed is a Broken; which of the gateway's errors that is, `upstream` decides.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from enum import Enum, auto
from select import POLLERR, POLLHUP, POLLIN, poll
from typing import Any, cast

import h11

from torpor.sandbox.fifos import Pulse

HEAD_BYTES_MAX = 100 << 10
ARRIVED_BYTES_MAX = 1 << 20

RawHeaders = Sequence[tuple[bytes, bytes]]


class Failure(Enum):
    """What became of an exchange that got no whole answer."""

    SILENT = auto()
    """Nothing passed in either direction for too long."""
    LOST = auto()
    """The connection broke."""
    NOT_HTTP = auto()
    """The connection ended before the answer did, or what came was not HTTP."""
    UNSENDABLE = auto()
    """The request cannot be written down; none of it was sent."""


class Broken(Exception):
    """An exchange failed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.name)
        self.failure = failure


class Connection(asyncio.Protocol):
    """A connection that was made; `begin` an exchange, `send` it, then wait for `head` and fetch with `next`.

    Args:
        opened: where it is as long as its socket is open; `on_lost` fires when it leaves.

    Attributes:
        reusable: the last exchange ended as it should, and another may begin.
    """

    def __init__(self, opened: "set[Connection]", on_lost: Pulse) -> None:
        self.reusable = True
        self._opened = opened
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)
        self._head: h11.Response | None = None
        self._arrived: deque[bytes] = deque()
        self._arrived_bytes = 0
        self._paused = False
        self._whole = False
        self._failure: Failure | None = None
        self._outgoing = b""
        self._busy = False
        self._changed = Pulse()
        self._heard = 0.0
        self._unsent_bytes = 0
        self._silence_seconds = 0.0
        self._watch: asyncio.TimerHandle | None = None

    # --- the exchange ------------------------------------------------------------------------------------------------

    def begin(self, *, method: str, target: bytes, headers: RawHeaders, body: bytes) -> None:
        """Write a request down; not a byte of it leaves before `send`.

        Raises:
            Broken: `UNSENDABLE`.
        """
        try:
            request = h11.Request(method=method, target=target, headers=list(headers))
            pieces = [self._http.send(request)]
            if body:
                pieces.append(self._http.send(h11.Data(data=body)))
            pieces.append(self._http.send(h11.EndOfMessage()))
        except h11.LocalProtocolError:
            self.reusable = False
            raise Broken(Failure.UNSENDABLE) from None
        self._outgoing = b"".join(piece for piece in pieces if piece)
        self._busy = True

    def send(self, *, silence_seconds: float) -> None:
        """Let the request go."""
        transport = self._transport
        outgoing, self._outgoing = self._outgoing, b""
        if transport is None or transport.is_closing():
            self._fail(Failure.LOST)
            return
        self._silence_seconds = silence_seconds
        transport.write(outgoing)
        self._heard = self._loop.time()
        self._unsent_bytes = transport.get_write_buffer_size()
        self._watch = self._loop.call_later(silence_seconds, self._check_silence)

    async def head(self) -> h11.Response:
        """The head of the answer.

        Raises:
            Broken: none came.
        """
        while self._head is None:
            if self._failure is not None:
                raise Broken(self._failure)
            await self._changed.wait()
        return self._head

    async def next(self) -> bytes:
        """What arrived of the body since the last time, waiting for something; empty at the end.

        Raises:
            Broken: the answer broke off, and all that came of it was fetched.
        """
        while not self._arrived:
            if self._whole:
                return b""
            if self._failure is not None:
                raise Broken(self._failure)
            await self._changed.wait()
        batch = self._arrived[0] if len(self._arrived) == 1 else b"".join(self._arrived)
        self._arrived.clear()
        self._arrived_bytes = 0
        if self._paused:
            self._paused = False
            self._heard = self._loop.time()
            if self._transport is not None:
                self._transport.resume_reading()
        return batch

    def end(self) -> None:
        """Leave the exchange, wherever it is; afterwards the connection is reusable or closed."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._busy = False
        both_done = self._http.our_state is h11.DONE and self._http.their_state is h11.DONE
        if self.reusable and self._whole and both_done and self._http.trailing_data == (b"", False):
            self._http.start_next_cycle()
            self._head, self._whole = None, False
        else:
            self.close()

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def is_fresh(self) -> bool:
        """Whether an idle connection may be used: the provider has neither closed it nor said anything.

        The loop may not have looked yet, so the socket is asked.
        """
        transport = self._transport
        if not self.reusable or transport is None or transport.is_closing():
            return False
        waiting = poll()
        waiting.register(transport.get_extra_info("socket").fileno(), POLLIN | POLLERR | POLLHUP)
        return not waiting.poll(0)

    # --- what the loop calls -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._opened.add(self)

    def data_received(self, data: bytes) -> None:
        if not self._busy:
            self.close()  # Nobody asked.
            return
        self._heard = self._loop.time()
        self._receive(data)

    def eof_received(self) -> None:
        """The transport closes itself then."""
        if self._busy:
            self._receive(b"")
        self.reusable = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._busy:
            if exc is None:
                self._receive(b"")
            self._fail(Failure.LOST)
        self._opened.discard(self)
        self._on_lost.fire()

    def _receive(self, data: bytes) -> None:
        if self._whole or self._failure is not None:
            self.reusable = False
            return
        try:
            self._http.receive_data(data)
            self._read_events()
        except h11.RemoteProtocolError:
            self._fail(Failure.NOT_HTTP)
        self._changed.fire()

    def _read_events(self) -> None:
        while True:
            event: Any = self._http.next_event()
            if isinstance(event, h11.Data):
                self._arrived.append(bytes(event.data))
                self._arrived_bytes += len(event.data)
            elif isinstance(event, h11.Response):
                self._head = event
            elif isinstance(event, h11.EndOfMessage):
                self._whole = True
                break
            elif event is h11.NEED_DATA or event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                break
        if self._arrived_bytes > ARRIVED_BYTES_MAX and not self._whole and not self._paused:
            self._paused = True
            if self._transport is not None:
                self._transport.pause_reading()

    def _fail(self, failure: Failure) -> None:
        self.reusable = False
        if not self._whole and self._failure is None:
            self._failure = failure
            self._changed.fire()

    def _check_silence(self) -> None:
        """Bytes in either direction count; while the log is behind, the provider is not to blame."""
        unsent = self._transport.get_write_buffer_size() if self._transport is not None else 0
        if unsent != self._unsent_bytes or self._paused:
            self._unsent_bytes = unsent
            self._heard = self._loop.time()
        rest = self._heard + self._silence_seconds - self._loop.time()
        if rest > 0:
            self._watch = self._loop.call_later(rest, self._check_silence)
        else:
            self._watch = None
            self._fail(Failure.SILENT)
