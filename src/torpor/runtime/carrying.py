"""Carries a worker's bytes between its stream in the sandbox and whoever asked for it, without reading them.

Each direction holds one piece, so a slow end slows the other down. When either end is gone both are closed: the one who
asked learns from what the worker said last whether it was done.
"""

import asyncio
import contextlib

from torpor.sandbox.streams import WINDOW_BYTES, Stream, StreamGone


async def carry(stream: Stream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry until one end is closed; the stream is reset and forgotten then."""
    try:
        async with asyncio.TaskGroup() as tasks:
            ways = [tasks.create_task(_to_guest(stream, reader)), tasks.create_task(_from_guest(stream, writer))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
    finally:
        stream.reset()
        stream.forget()


async def _to_guest(stream: Stream, reader: asyncio.StreamReader) -> None:
    try:
        while data := await reader.read(WINDOW_BYTES):
            await stream.send(stream.sent, data)
    except ConnectionError:
        return
    except StreamGone:
        # The worker may have said something before it went: the other way ends when that was read.
        await asyncio.Event().wait()


async def _from_guest(stream: Stream, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(StreamGone, ConnectionError):
        while data := await stream.receive():
            stream.acknowledge(stream.received)
            writer.write(data)
            await writer.drain()
