"""Carries a worker's bytes between its stream in the sandbox and whoever asked for it, without reading them.

Each direction holds one piece, so a slow end slows the other down. When either end is gone both are closed: the one who
asked learns from what the worker said last whether it was done.
"""

import asyncio
import contextlib

from torpor.sandbox.streams import WINDOW_BYTES, Stream, StreamGone

PARTING_SECONDS = 10


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
    await _part(reader, writer)


async def _part(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Let the one who asked hang up, and read what he says until then.

    If his connection were closed first, his next piece of input would fail, and take with it what he has not read yet:
    the worker's last words.
    """
    with contextlib.suppress(ConnectionError, TimeoutError):
        writer.write_eof()
        async with asyncio.timeout(PARTING_SECONDS):
            while await reader.read(WINDOW_BYTES):
                continue


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
