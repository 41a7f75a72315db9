"""`torpor cp`: files and directories between this machine and a running session."""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated

import msgspec
import typer
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TransferSpeedColumn

from torpor.cli.lifecycle import Opened, opener
from torpor.cli.printer import err, human_bytes, notice, print_json
from torpor.core.errors import InvalidInput, SandboxFailed
from torpor.node import open_node
from torpor.runtime.copying import Copied, Incoming, outgoing, place_of
from torpor.runtime.spec import SessionSpec
from torpor.sandbox.workers import COPY_IN, COPY_OUT, RecordReader, encode

_REMOTE = re.compile(r"([^/:]+):(.+)", re.DOTALL)
_READ_BYTES = 65_536
_PROGRESS_AFTER_SECONDS = 1


def register(app: typer.Typer) -> None:
    app.command("cp")(copy)


def copy(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="SESSION:PATH, or a path of this machine.")],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="The other kind.")],
    json: Annotated[bool, typer.Option("--json", help="Print what was copied as JSON.")] = False,
) -> None:
    """Copy a file or a directory out of a running session (SESSION:PATH DEST) or into it (SOURCE SESSION:PATH).

    A relative PATH lies in /workspace. Into a directory that exists, the copy goes by its own name. It appears when it
    is whole; one that is interrupted leaves nothing. A directory of that name is never merged or replaced, a file is.
    """
    outward, inward = _REMOTE.fullmatch(source), _REMOTE.fullmatch(destination)
    if outward and not inward:
        copied = asyncio.run(_out(outward[1], outward[2], Path(destination)))
    elif inward and not outward:
        copied = asyncio.run(_in(Path(source), inward[1], inward[2]))
    else:
        hint = "torpor cp SESSION:PATH DEST, or torpor cp SOURCE SESSION:PATH; ./a:b is a path of this machine."
        raise InvalidInput("copy_impossible", "cannot copy: one of both has to be in a session", hint=hint)
    for path, reason in copied.left_out:
        notice(f"left out {path}: {reason}")
    if json:
        left_out = [{"path": path, "reason": reason} for path, reason in copied.left_out]
        print_json({"files": copied.files, "bytes": copied.data_bytes, "left_out": left_out})
    else:
        notice(f"{copied.files} files, {human_bytes(copied.data_bytes)}")


async def _out(session: str, path: str, local: Path) -> Copied:
    open_worker, remote = await _find(session, path)
    with Incoming(place_of(local, remote.name or "root")) as incoming:
        async with open_worker(COPY_OUT) as (reader, writer), _shown(incoming.copied):
            writer.write(encode(b"R", str(remote).encode("utf-8", "surrogateescape")))
            records = RecordReader()
            while data := await reader.read(_READ_BYTES):
                for record in records.feed(data):
                    if record.kind == b"F":
                        raise InvalidInput("copy_impossible", record.failure[1])
                    if record.kind == b"K":
                        return incoming.finish()
                    incoming.take(record)
        raise _cut_off(session)


async def _in(local: Path, session: str, path: str) -> Copied:
    copied = Copied()
    name = local.resolve().name
    if not local.exists() or not name:
        raise InvalidInput("copy_impossible", f"cannot copy {local}: it is no file or directory")
    open_worker, remote = await _find(session, path)
    async with open_worker(COPY_IN) as (reader, writer), _shown(copied):
        target = f"{remote}\0{name}".encode("utf-8", "surrogateescape")
        sending = asyncio.ensure_future(_send(writer, encode(b"R", target), outgoing(local, copied)))
        try:
            await _until_taken(session, reader, sending)
        finally:
            sending.cancel()
    return copied


async def _send(writer: asyncio.StreamWriter, request: bytes, records: Iterable[bytes]) -> None:
    writer.write(request)
    for record in records:
        writer.write(record)
        await writer.drain()
    writer.write(encode(b"K"))
    await writer.drain()


async def _until_taken(session: str, reader: asyncio.StreamReader, sending: "asyncio.Future[None]") -> None:
    """Wait for the worker's word, or for the reason that there is nothing more to send."""
    records = RecordReader()
    while True:
        reading = asyncio.ensure_future(reader.read(_READ_BYTES))
        waiting = {reading} if sending.done() else {reading, sending}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if sending.done() and isinstance(error := sending.exception(), InvalidInput):
            reading.cancel()
            raise error
        data = await reading
        for record in records.feed(data):
            if record.kind == b"F":
                raise InvalidInput("copy_impossible", record.failure[1])
            if record.kind == b"K":
                return
        if not data:
            raise _cut_off(session)


async def _find(session: str, path: str) -> tuple[Callable[[str], Opened], PurePosixPath]:
    """What opens workers in the session, and the path as it is inside."""
    async with open_node() as node:
        found = await node.runtime.session(session)
        return opener(node, found), PurePosixPath(msgspec.convert(found.spec, SessionSpec).cwd, path)


@contextlib.asynccontextmanager
async def _shown(copied: Copied) -> AsyncGenerator[None]:
    """A line of progress, once it takes more than a second, on a terminal."""
    columns = (SpinnerColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal, auto_refresh=False) as progress:
        task = progress.add_task("", total=None, visible=False)

        async def show() -> None:
            while True:
                await asyncio.sleep(_PROGRESS_AFTER_SECONDS)
                progress.update(task, completed=copied.data_bytes, visible=True)
                progress.refresh()

        showing = asyncio.ensure_future(show())
        try:
            yield
        finally:
            showing.cancel()


def _cut_off(session: str) -> SandboxFailed:
    hint = "Nothing of it is left; do it once more. `torpor log SESSION` says what became of the sandbox."
    return SandboxFailed(
        "copy_cut_off", f"cannot finish the copy of session {session}: its sandbox went away", hint=hint
    )
