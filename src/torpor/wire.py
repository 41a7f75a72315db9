"""How a process asks a node: one JSON object a line over the node's Unix socket (mode 0600), one answer back.

Verbs are the runtime's own. The socket is for the same user on the same machine; nothing in a sandbox can reach it.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

from torpor.core.errors import Conflict, TorporError

LINE_BYTES_MAX = 400 << 20
"""A message to a session is one; JSON may take six bytes for one of its text."""
LAST_ANSWERS_SECONDS = 5
Verb = Callable[..., Awaitable[dict[str, Any]]]


@contextlib.asynccontextmanager
async def serve(socket: Path, verbs: dict[str, Verb]) -> AsyncGenerator[None]:
    """Answer requests while the context lasts."""

    answering: set[asyncio.Task[None] | None] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.add(task := asyncio.current_task())
        try:
            line = await reader.readline()
            writer.write(json.dumps(await _perform(verbs, line)).encode() + b"\n")
            await writer.drain()
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
    directory = os.open(socket.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        async with asyncio.timeout(deadline_seconds):
            address = f"/proc/self/fd/{directory}/{socket.name}"
            reader, writer = await asyncio.open_unix_connection(address, limit=LINE_BYTES_MAX)
            try:
                writer.write(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
                await writer.drain()
                line = await reader.readline()
            finally:
                writer.close()
    finally:
        os.close(directory)
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
