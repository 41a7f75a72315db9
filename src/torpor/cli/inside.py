"""`torpor exec`: a program beside the agent, with this process's standard streams.

The node of the session carries the bytes and reads none of them; what the worker in the sandbox says is hostile until
`RecordReader` has cut it. When the connection ends before the program's exit was told, the program was not seen to end.
"""

import asyncio
import errno
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Annotated, Any

import msgspec
import typer

from torpor.cli.lifecycle import SESSION, Opened, opener
from torpor.cli.printer import notice, print_error
from torpor.cli.running import env_pairs
from torpor.core.errors import Conflict, InvalidInput
from torpor.core.ids import SessionId
from torpor.core.session import ENDED, SessionStatus
from torpor.node import open_node
from torpor.runtime.spec import SessionSpec
from torpor.sandbox.frames import PAYLOAD_BYTES_MAX, AgentSpec
from torpor.sandbox.workers import EXEC, NUMBER, STDIN_WINDOW_BYTES, Record, RecordReader, encode, exec_request

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)
INTERRUPTS_MAX = 2
"""The next Ctrl-C leaves the program alone."""
_READ_BYTES = 65_536


def register(app: typer.Typer) -> None:
    app.command("exec")(execute)


def execute(
    session: Annotated[str, SESSION],
    command: Annotated[list[str], typer.Argument(metavar="-- CMD", help="The command, as the agent would run it.")],
    env: Annotated[
        list[str] | None, typer.Option(metavar="K=V", help="Added to the agent's environment; repeatable.")
    ] = None,
    workdir: Annotated[
        str | None, typer.Option("--workdir", "-w", metavar="DIR", help="Where it runs (default: /workspace).")
    ] = None,
    no_stdin: Annotated[
        bool, typer.Option("--no-stdin", "-n", help="Give it an empty stdin instead of this command's.")
    ] = False,
) -> None:
    """Run a command inside a running session, beside the agent, and pass on what it reads, writes and exits with.

    It has the agent's environment and directory, and no terminal. Ctrl-C interrupts it; the third one leaves it
    running. It belongs to the session: a checkpoint saves it, and in a restored sandbox it goes on, without these
    streams: then this command ends with exec_lost (75).

    Exits with the command's own status, 128+n for signal n, 127 if there is no such command, 126 if it can't be run.
    """

    async def work() -> int:
        async with open_node() as node:
            found = await node.runtime.session(session)
            open_worker = opener(node, found)
            agent = msgspec.convert(found.spec, SessionSpec)
        environment = {**agent.environment, **env_pairs(env or [])}
        spec = AgentSpec(arguments=tuple(command), cwd=workdir or agent.cwd, environment=environment)
        status = await _follow(open_worker(EXEC), exec_request(spec), no_stdin=no_stdin)
        if status is None:
            raise await _lost(found.session_id)
        return status

    raise typer.Exit(asyncio.run(work()))


async def _follow(opening: Opened, request: bytes, *, no_stdin: bool) -> int | None:
    """The program's exit status; None: it was not seen to end."""
    async with opening as (reader, writer):
        attached = _Attached(reader, writer)
        writer.write(request)
        loop = asyncio.get_running_loop()
        for number in FORWARDED:
            loop.add_signal_handler(number, attached.forward, number)
        try:
            attached.feed_stdin(empty=no_stdin)
            return await attached.run()
        finally:
            for number in FORWARDED:
                loop.remove_signal_handler(number)


async def _lost(session_id: SessionId) -> Conflict:
    async with open_node() as node:
        now = await node.runtime.session(session_id)
    reason = "its sandbox was lost or restored, or its node ended"
    if now.status in ENDED:
        reason = f"the session has {now.status}"
    elif now.status is SessionStatus.ASLEEP:
        reason = "the session was stopped"
    return Conflict(
        "exec_lost",
        f"cannot say how the program in session {session_id} ended: {reason}",
        hint="A program that is in the checkpoint goes on in the restored sandbox, with its input and output cut off.",
    )


class _Attached:
    """This process's end of one program."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._records = RecordReader()
        self._window = STDIN_WINDOW_BYTES
        self._granted = asyncio.Event()
        self._interrupts = 0
        self._left = asyncio.Event()

    def forward(self, number: int) -> None:
        """Send a signal to the program's process group."""
        self._interrupts += number == signal.SIGINT
        if self._interrupts > INTERRUPTS_MAX:
            self._left.set()
            return
        if self._interrupts == INTERRUPTS_MAX and number == signal.SIGINT:
            notice("interrupted it again; the next Ctrl-C leaves it running")
        self._writer.write(encode(b"S", NUMBER.pack(number)))

    def feed_stdin(self, *, empty: bool) -> None:
        if empty:
            self._writer.write(encode(b"I"))
        else:
            # A thread: stdin may be a file, which no event loop can wait for. It ends with the process.
            loop = asyncio.get_running_loop()
            threading.Thread(target=self._read_stdin, args=(loop,), daemon=True).start()

    async def run(self) -> int | None:
        """Pass on output until the program's end; None when the connection ends first."""
        reading = asyncio.ensure_future(self._pass_on())
        leaving = asyncio.ensure_future(self._left.wait())
        try:
            await asyncio.wait([reading, leaving], return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
            raise KeyboardInterrupt
        finally:
            for task in (reading, leaving):
                task.cancel()

    async def _pass_on(self) -> int | None:
        with suppress(ConnectionError):
            while data := await self._reader.read(_READ_BYTES):
                for record in self._records.feed(data):
                    status = await self._take(record)
                    if status is not None:
                        return status
        return None

    async def _take(self, record: Record) -> int | None:
        match record.kind:
            case b"O":
                await self._write(sys.stdout, record.payload)
            case b"E":
                await self._write(sys.stderr, record.payload)
            case b"W":
                self._window += max(record.number, 0)
                self._granted.set()
            case b"X":
                return _exit_status(record.number)
            case b"F":
                return _cannot_run(*record.failure)
            case _:
                pass
        return None

    async def _write(self, target: Any, data: bytes) -> None:
        try:
            target.buffer.write(data)
            target.buffer.flush()
        except BrokenPipeError:
            # Whoever read our output is gone: the program learns of it as it would have without us.
            self._writer.write(encode(b"S", NUMBER.pack(signal.SIGPIPE)))
            await self._writer.drain()
            raise

    def _read_stdin(self, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError, OSError):  # The loop is closed: the program has ended. Or there is no stdin.
            while data := os.read(0, PAYLOAD_BYTES_MAX):
                asyncio.run_coroutine_threadsafe(self._give(data), loop).result()
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._writer.write, encode(b"I"))

    async def _give(self, data: bytes) -> None:
        while self._window < len(data):
            self._granted.clear()
            await self._granted.wait()
        self._window -= len(data)
        self._writer.write(encode(b"I", data))
        await self._writer.drain()


def _exit_status(wait_status: int) -> int:
    """As a shell gives it, whatever the sandbox says."""
    if os.WIFSIGNALED(wait_status):
        return 128 + os.WTERMSIG(wait_status)
    return os.WEXITSTATUS(wait_status)


def _cannot_run(number: int, reason: str) -> int:
    """Say why, and the exit status that a shell gives."""
    print_error(InvalidInput("program_cannot_run", reason or f"cannot run it: {os.strerror(min(abs(number), 4095))}"))
    return 127 if number == errno.ENOENT else 126
