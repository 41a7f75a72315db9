"""How a process asks a node: one JSON object a line over the node's Unix socket (mode 0600), one answer back.

Verbs are the runtime's own. A channel is a verb after whose answer the connection carries bytes both ways. The socket
is for the same user on the same machine; nothing in a sandbox can reach it.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from torpor.core.errors import Conflict, TorporError

LINE_BYTES_MAX = 400 << 20
"""A message to a session is one; JSON may take six bytes for one of its text."""
LAST_ANSWERS_SECONDS = 5
Verb = Callable[..., Awaitable[dict[str, Any]]]
Carry = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Channel = Callable[..., Awaitable[Carry]]
"""Opens something; what it returns carries its bytes until one of both ends is closed."""


@contextlib.asynccontextmanager
async def serve(
    socket: Path, verbs: dict[str, Verb], channels: Mapping[str, Channel] | None = None
) -> AsyncGenerator[None]:
    """Answer requests while the context lasts."""

    answering: set[asyncio.Task[None] | None] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.add(task := asyncio.current_task())
        try:
            line = await reader.readline()
            carries: list[Carry] = []
            answered = await _perform({**verbs, **_opening(channels or {}, carries)}, line)
            writer.write(json.dumps(answered).encode() + b"\n")
            await writer.drain()
            for carry in carries:
                await carry(reader, writer)
        except ConnectionError:
            return  # Whoever asked is gone.
        finally:
            writer.close()
            answering.discard(task)

    socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    socket.unlink(missing_ok=True)
    # The path may be longer than a socket address holds: bind through the open directory.
    directory = os.open(socket.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        address = f"/proc/self/fd/{directory}/{socket.name}"
        server = await asyncio.start_unix_server(answer, address, limit=LINE_BYTES_MAX)
        socket.chmod(0o600)
        async with server:
            yield
            # What was asked while the context ended is answered still.
            if unanswered := [task for task in answering if task is not None]:
                await asyncio.wait(unanswered, timeout=LAST_ANSWERS_SECONDS)
    finally:
        os.close(directory)
        socket.unlink(missing_ok=True)


def _opening(channels: Mapping[str, Channel], carries: list[Carry]) -> dict[str, Verb]:
    """The channels as verbs: each opens, answers nothing, and leaves in `carries` what is to be done then."""

    def verb(channel: Channel) -> Verb:
        async def opened(**arguments: Any) -> dict[str, Any]:
            carries.append(await channel(**arguments))
            return {}

        return opened

    return {name: verb(channel) for name, channel in channels.items()}


async def _perform(verbs: dict[str, Verb], line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
        verb = verbs[request.pop("verb")]
    except (ValueError, KeyError, AttributeError, TypeError):
        return {
            "error": {"code": "verb_unknown", "message": "cannot do that: this node knows no such verb", "hint": ""}
        }
    try:
        return {"result": await verb(**request)}
    except TorporError as error:
        return {"error": {"code": error.code, "message": str(error), "hint": error.hint}}


async def ask(socket: Path, verb: str, *, deadline_seconds: float, **arguments: object) -> dict[str, Any]:
    """Ask the node behind `socket`.

    Raises:
        Conflict: the node's own refusal, with its code.
        OSError, TimeoutError: nobody answers there.
    """
    async with asyncio.timeout(deadline_seconds):
        reader, writer = await _connect(socket)
        try:
            return await _answer(reader, writer, verb, arguments)
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def open_channel(
    socket: Path, channel: str, *, deadline_seconds: float, **arguments: object
) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Ask the node behind `socket` to open something, and give its bytes, both ways.

    Args:
        deadline_seconds: for the opening.

    Raises:
        As `ask`.
    """
    async with asyncio.timeout(deadline_seconds):
        reader, writer = await _connect(socket)
    try:
        async with asyncio.timeout(deadline_seconds):
            await _answer(reader, writer, channel, arguments)
        yield reader, writer
    finally:
        writer.close()


async def _connect(socket: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    directory = os.open(socket.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        address = f"/proc/self/fd/{directory}/{socket.name}"
        return await asyncio.open_unix_connection(address, limit=LINE_BYTES_MAX)
    finally:
        os.close(directory)


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, verb: str, arguments: dict[str, object]
) -> dict[str, Any]:
    writer.write(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
    await writer.drain()
    line = await reader.readline()
    if not line:
        raise ConnectionResetError("the node closed the connection without an answer")
    answer = json.loads(line)
    if "error" in answer:
        error = answer["error"]
        raise Conflict(error["code"], error["message"], hint=error["hint"])
    return answer["result"]


async def answers(socket: Path, *, deadline_seconds: float = 3) -> bool:
    """Whether the node behind `socket` is well."""
    try:
        await ask(socket, "ping", deadline_seconds=deadline_seconds)
    except (OSError, TimeoutError, ValueError):
        return False
    return True
