"""Delivers the log's rows of one attempt to a stream: live, repeated and joined answers take this one path.

A `Recording` holds the rows of an attempt as they are written, and wakes who waits for more. It never holds a byte that
is not in the log. The bytes on the agent's socket are made by `core.delivery.Tape`, a pure function of the rows.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

from torpor.core.call import ResponseHead
from torpor.core.delivery import Tape
from torpor.core.join import StreamEnd
from torpor.sandbox.fifos import Pulse
from torpor.sandbox.streams import Closed, Stream, StreamGone

_ENDS = {Closed.CONSUMED: StreamEnd.CONSUMED, Closed.GONE: StreamEnd.GONE, Closed.RESET: StreamEnd.RESET}


class Recording:
    """The rows of one attempt that are in the log.

    Attributes:
        attempt: its number.
        finished: None while more may come; True after its proper end; False if it never gets one.
    """

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.head: ResponseHead | None = None
        self.chunks: list[bytes] = []
        self.finished: bool | None = None
        self._changed = Pulse()

    def add_head(self, head: ResponseHead) -> None:
        self.head = head
        self._changed.fire()

    def add_chunk(self, data: bytes) -> None:
        self.chunks.append(data)
        self._changed.fire()

    def end(self, *, finished: bool) -> None:
        self.finished = finished
        self._changed.fire()

    async def rows(self) -> AsyncGenerator[ResponseHead | bytes]:
        """The head and the chunks, waiting for each; ends when no more will come."""
        while self.head is None and self.finished is None:
            await self._changed.wait()
        if self.head is not None:
            yield self.head
        number = 0
        while True:
            while number < len(self.chunks):
                yield self.chunks[number]
                number += 1
            if self.finished is not None:
                return
            await self._changed.wait()


async def deliver(stream: Stream, recording: Recording, *, continued: bool) -> StreamEnd | None:
    """Deliver from where the stream stands until it closes; None when the link ended first.

    Args:
        continued: this stream's client asked for `100 Continue`; a client that joined may differ from the first.
    """
    async with asyncio.TaskGroup() as group:
        sending = group.create_task(_send_rows(stream, recording, continued=continued))
        end = await closed(stream)
        sending.cancel()
    return end


async def deliver_locally(stream: Stream, head: ResponseHead, body: bytes) -> None:
    """Deliver an answer that is in no log, throwing away what the client still sends."""
    recording = Recording(0)
    recording.add_head(head)
    if body:
        recording.add_chunk(body)
    recording.end(finished=True)
    async with asyncio.TaskGroup() as group:
        draining = group.create_task(_drain(stream))
        await deliver(stream, recording, continued=head.continued)
        draining.cancel()


async def _drain(stream: Stream) -> None:
    try:
        while await stream.receive():
            pass
    except StreamGone:
        return


async def closed(stream: Stream) -> StreamEnd | None:
    """Wait for a stream's end; None when the link ended first."""
    try:
        return _ENDS[await stream.wait_closed()]
    except StreamGone:
        return None


async def _send_rows(stream: Stream, recording: Recording, *, continued: bool) -> None:
    """A clean end only for a finished attempt; anything else breaks the connection off."""
    tape = Tape(stream.sent)
    try:
        async for row in recording.rows():
            if isinstance(row, ResponseHead):
                await _send(stream, tape, tape.head(replace(row, continued=continued)))
            else:
                await _send(stream, tape, tape.chunk(row))
        if recording.finished:
            await _send(stream, tape, tape.finish())
            await stream.finish(tape.position)
        else:
            stream.reset()
    except StreamGone:
        return  # Whoever waits for the stream's end learns how.


async def _send(stream: Stream, tape: Tape, fresh: bytes) -> None:
    if fresh:
        await stream.send(tape.position - len(fresh), fresh)
