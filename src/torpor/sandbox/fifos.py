"""The two FIFOs of a sandbox as a transport of frames: opened unblocked, written in order, held for a cut.

Owns the host's two descriptors and the queue between them and the senders; no threads. The queue is bounded
by `room`, which senders of data await, and by `read`, which stops for a guest that does not read.
"""

import asyncio
import errno
import os
from collections import deque
from pathlib import Path

from torpor.sandbox.frames import Frame, ToGuest, encode

READ_BYTES = 65_536
QUEUE_BYTES = 262_144
"""Senders of data wait while more than this is queued."""
CHOKE_BYTES = 1_048_576
"""Only answers to the guest's own frames can queue this much: then reading stops until it takes them."""
PIECES_MAX = 4
"""Pieces that wait here to be fetched; then the FIFO has to hold the rest."""
_OPEN_RETRY_SECONDS = 0.01


def open_guest_ends(*, to_guest: Path, from_guest: Path) -> tuple[int, int]:
    """Open the sandbox's stdin and stdout, blocking descriptors that the caller closes.

    Never O_RDWR: a save of the sandbox would drain its own output, and the host's death would go unseen.
    A write end opens only while someone reads, hence the helper descriptor.
    """
    stdin = os.open(to_guest, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        helper = os.open(from_guest, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            stdout = os.open(from_guest, os.O_WRONLY | os.O_CLOEXEC)
        finally:
            os.close(helper)
    except BaseException:
        os.close(stdin)
        raise
    os.set_blocking(stdin, True)
    return stdin, stdout


class Pulse:
    """Wakes everyone who waits at this moment and remembers nothing: who wakes looks again."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()

    def fire(self) -> None:
        self._event.set()
        self._event.clear()


class Fifos:
    """The host's ends. Frames are written in the order of posting; a lost guest shows in `read` alone."""

    def __init__(self, *, write_end: int, read_end: int, nonce: bytes) -> None:
        self._loop = asyncio.get_running_loop()
        self._write_end = write_end
        self._read_end = read_end
        self._nonce = nonce
        self._queue: deque[memoryview] = deque([memoryview(b"\0")])  # Ends half a frame of a dead node.
        self._queued_bytes = 1
        self._blocked = False
        self._held: list[bytes] | None = None
        self._delivering = True
        self._broken = False
        self._closed = False
        self._changed = Pulse()
        self._arrived: deque[bytes] = deque()
        self._at_end = False
        self._listening = False
        self._reader: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, *, to_guest: Path, from_guest: Path, nonce: bytes) -> "Fifos":
        """Open both ends, however long the sandbox takes to open its own: the caller brings the deadline."""
        read_end = os.open(from_guest, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            write_end = await _open_write_end(to_guest)
        except BaseException:
            os.close(read_end)
            raise
        return cls(write_end=write_end, read_end=read_end, nonce=nonce)

    def post(self, kind: ToGuest, stream: int = 0, arg: int = 0, payload: bytes = b"") -> None:
        """Queue one frame; never waits. While a cut holds the link it stays behind the cut."""
        if self._closed or self._broken:
            return
        data = encode(Frame(nonce=self._nonce, type=kind, stream=stream, arg=arg, payload=payload))
        if self._held is not None:
            self._held.append(data)
        else:
            self._enqueue(data)

    async def room(self) -> None:
        """Wait until data may be posted: no cut, no restore under way, a short queue. Returns when closed."""
        while not self._closed and (self._held is not None or not self._delivering or self._queued_bytes > QUEUE_BYTES):
            await self._changed.wait()

    def deliver(self, allowed: bool) -> None:
        """Allow or refuse data; other frames pass."""
        self._delivering = allowed
        self._changed.fire()

    def hold(self) -> None:
        """What was posted until now is still written, nothing after it."""
        self._held = []

    def unhold(self, kind: ToGuest, arg: int) -> None:
        """Write the given frame, then what was held."""
        held, self._held = self._held, None
        self.post(kind, arg=arg)
        for data in held or ():
            self._enqueue(data)
        self._changed.fire()

    async def read(self) -> bytes:
        """Wait for the next bytes of the guest; empty when it is gone, or when this end was closed."""
        while not self._arrived:
            if self._closed or self._at_end:
                return b""
            if self._broken:
                return self._read_rest()
            if self._queued_bytes > CHOKE_BYTES:
                self._stop_listening()
                await self._changed.wait()
                continue
            self._listen()
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._arrived.popleft()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._arrived.clear()
        self._stop_writing()
        self._stop_listening()
        self._wake_reader()
        os.close(self._read_end)
        os.close(self._write_end)
        self._changed.fire()

    def _enqueue(self, data: bytes) -> None:
        self._queue.append(memoryview(data))
        self._queued_bytes += len(data)
        if not self._blocked:
            self._flush()

    def _flush(self) -> None:
        try:
            while self._queue:
                written = os.write(self._write_end, self._queue[0])
                self._queued_bytes -= written
                self._queue[0] = self._queue[0][written:]
                if not self._queue[0]:
                    self._queue.popleft()
        except BlockingIOError:
            if not self._blocked:
                self._loop.add_writer(self._write_end, self._flush)
                self._blocked = True
        except BrokenPipeError:
            self._broken = True
            self._stop_writing()
            self._wake_reader()
        else:
            self._unblock()
        self._changed.fire()

    def _stop_writing(self) -> None:
        self._unblock()
        self._queue.clear()
        self._queued_bytes = 0
        self._held = None

    def _unblock(self) -> None:
        if self._blocked:
            self._loop.remove_writer(self._write_end)
            self._blocked = False

    def _listen(self) -> None:
        # A read before a poll would take "no guest yet" for "guest gone": only a poll tells them apart.
        if not self._listening:
            self._loop.add_reader(self._read_end, self._on_readable)
            self._listening = True

    def _stop_listening(self) -> None:
        if self._listening:
            self._loop.remove_reader(self._read_end)
            self._listening = False

    def _on_readable(self) -> None:
        try:
            data = os.read(self._read_end, READ_BYTES)
        except BlockingIOError:
            return
        if data:
            self._arrived.append(data)
        else:
            self._at_end = True
        if self._at_end or len(self._arrived) >= PIECES_MAX:
            self._stop_listening()
        self._wake_reader()

    def _read_rest(self) -> bytes:
        """What the guest had written before it closed its end of the other FIFO."""
        try:
            return os.read(self._read_end, READ_BYTES)
        except BlockingIOError:
            return b""

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


async def _open_write_end(path: Path) -> int:
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        # No call waits for the other end of a FIFO without blocking the thread.
        await asyncio.sleep(_OPEN_RETRY_SECONDS)
