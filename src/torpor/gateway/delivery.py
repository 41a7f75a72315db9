"""Delivers the log's rows of one attempt to a stream: live, repeated and joined answers take this one path.

A `Recording` holds the rows of an attempt as they are written, and wakes who waits for more. It never holds a byte that
is not in the log. The bytes on the agent's socket are made by `core.delivery.Tape`, a pure function of the rows.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeAlias

from torpor.core.call import ResponseHead
from torpor.core.delivery import Tape
from torpor.core.join import StreamEnd
from torpor.core.usage import UsageHider
from torpor.gateway.dialects.base import Dialect, Shape
from torpor.gateway.reshape import has_events, reshaped
from torpor.sandbox.fifos import Pulse
from torpor.sandbox.frames import Closed
from torpor.sandbox.streams import Stream, StreamGone

TOGETHER_BYTES_MAX = 32_768

Row: TypeAlias = "ResponseHead | bytes | None"
"""The head, a chunk, or the proper end of an attempt."""

_ENDS = {Closed.CONSUMED: StreamEnd.CONSUMED, Closed.GONE: StreamEnd.GONE, Closed.RESET: StreamEnd.RESET}


class Recording:
    """The rows of one attempt that are in the log.

    Attributes:
        attempt: its number.
        finished: None while more may come; True after its proper end; False if it never gets one.
        on_head: called when the head is there, which comes with the first byte of the body.
    """

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.head: ResponseHead | None = None
        self.chunks: list[bytes] = []
        self.finished: bool | None = None
        self.on_head: Callable[[], None] | None = None
        self._changed = Pulse()

    @property
    def body_bytes(self) -> int:
        return sum(map(len, self.chunks))

    def add_head(self, head: ResponseHead) -> None:
        self.head = head
        if self.on_head is not None:
            self.on_head()
        self._changed.fire()

    def add_chunk(self, data: bytes) -> None:
        self.chunks.append(data)
        self._changed.fire()

    def end(self, *, finished: bool) -> None:
        self.finished = finished
        self._changed.fire()

    async def rows(self) -> AsyncGenerator[Sequence[Row]]:
        """The head, the chunks, and the proper end (None) if there is one: waits for some, and gives all there are."""
        await self.wait_begin()
        number = 0
        fresh: list[Row] = [] if self.head is None else [self.head]
        while True:
            fresh += self.chunks[number:]
            number = len(self.chunks)
            over = self.finished is not None
            if self.finished:
                fresh.append(None)
            if fresh:
                yield fresh
                fresh = []
            if over:
                return
            if number == len(self.chunks) and self.finished is None:
                await self._changed.wait()

    async def wait_begin(self) -> None:
        """Until its head is there, or it is known that none comes."""
        while self.head is None and self.finished is None:
            await self._changed.wait()

    async def wait_end(self) -> None:
        while self.finished is None:
            await self._changed.wait()


async def rows_in_shape(
    recording: Recording, dialect: Dialect, shape: Shape, *, hide_usage: bool = False
) -> AsyncGenerator[Sequence[Row]]:
    """The rows as one client gets them: in its shape, and without token counts that it did not ask for.

    Args:
        hide_usage: it did not ask for them; the head says whether anybody did.
    """
    hider: UsageHider | None = None
    async with aclosing(_shaped_rows(recording, dialect, shape)) as batches:
        async for rows in batches:
            shown: list[Row] = []
            for row in rows:
                if isinstance(row, ResponseHead):
                    hider = UsageHider() if hide_usage and row.usage_asked and has_events(row) else None
                    shown.append(row)
                elif hider is None:
                    shown.append(row)
                elif row is None:
                    shown += [hider.rest(), None]
                else:
                    shown.append(hider.feed(row))
            yield shown


async def _shaped_rows(recording: Recording, dialect: Dialect, shape: Shape) -> AsyncGenerator[Sequence[Row]]:
    """The rows in another shape of the answer, once there is a whole answer to reshape."""
    if shape is not Shape.AS_SENT:
        await recording.wait_end()
        other = (
            reshaped(dialect, shape, recording.head, recording.chunks)
            if recording.finished and recording.head
            else None
        )
        if other is not None:
            yield [*other, None]
            return
    async for rows in recording.rows():
        yield rows


async def deliver(
    stream: Stream, rows: AsyncGenerator[Sequence[Row]], *, continued: bool, released: asyncio.Event | None = None
) -> StreamEnd | None:
    """Deliver from where the stream stands until it closes; None when the link ended first.

    Args:
        released: nothing is delivered before it is set.
        continued: this stream's client asked for `100 Continue`; a client that joined may differ from the first.
    """
    async with asyncio.TaskGroup() as group:
        sending = group.create_task(_send_rows(stream, rows, continued=continued, released=released))
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
        await deliver(stream, recording.rows(), continued=head.continued)
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


async def _send_rows(
    stream: Stream, rows: AsyncGenerator[Sequence[Row]], *, continued: bool, released: asyncio.Event | None
) -> None:
    """A clean end only after a proper one; anything else breaks the connection off."""
    if released is not None:
        await released.wait()
    tape = Tape(stream.sent)
    try:
        async with aclosing(rows):
            async for batch in rows:
                # One frame for what came together: each wakes init, and then the client.
                fresh = b""
                for row in batch:
                    if isinstance(row, ResponseHead):
                        fresh += tape.head(replace(row, continued=continued))
                    else:
                        fresh += tape.finish() if row is None else tape.chunk(row)
                    if len(fresh) >= TOGETHER_BYTES_MAX:
                        await _send(stream, tape, fresh)
                        fresh = b""
                await _send(stream, tape, fresh)
        if tape.ended:
            await stream.finish(tape.position)
        else:
            stream.reset()
    except StreamGone:
        return  # Whoever waits for the stream's end learns how.


async def _send(stream: Stream, tape: Tape, fresh: bytes) -> None:
    if fresh:
        await stream.send(tape.position - len(fresh), fresh)
