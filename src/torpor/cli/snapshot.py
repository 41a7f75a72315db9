"""`torpor snapshot`: a checkpoint with its memory, its files and its log, as one file for another machine."""

import asyncio
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from torpor import wire
from torpor.cli.printer import err, human_bytes, notice, print_json
from torpor.cli.progress import progress_bars
from torpor.cli.storing import parse_point
from torpor.core.clock import SystemClock
from torpor.core.errors import InvalidInput
from torpor.node import open_node
from torpor.runtime.runtime import open_runtime
from torpor.runtime.snapshot_export import Exported, export_snapshot
from torpor.runtime.snapshot_import import Imported, import_snapshot

JSON = typer.Option("--json", help="Print the result as JSON.")
PASSPHRASE = typer.Option("--passphrase-file", metavar="FILE", help="Its content, without the line's end, is the key.")


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="A checkpoint as one file that another machine can resume.")
    group.command("export", short_help="Write a checkpoint and the log to a file.")(export)
    group.command("import", short_help="Bring a session from such a file.")(import_)
    app.add_typer(group, name="snapshot")


def export(
    point: Annotated[str, typer.Argument(metavar="SESSION[@N]", help="A session, and a checkpoint (default: newest).")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; what is there is replaced.")],
    passphrase_file: Annotated[Path | None, PASSPHRASE] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Write one file from which another machine can resume the session.

    It holds all of the session: the agent's memory and files, and what its models saw. Whoever has it has the session,
    unless it is sealed with a passphrase.
    """
    session, number = parse_point(point)
    passphrase = _passphrase(passphrase_file)

    async def work() -> Exported:
        async with open_runtime(os.environ, SystemClock()) as runtime:
            found = await runtime.session(session)
            with progress_bars() as progress:
                return await export_snapshot(runtime, found, number, file, passphrase, progress)

    done = asyncio.run(work())
    if json:
        print_json(asdict(done))
        return
    how = "sealed" if done.sealed else "not sealed: who has the file has the session"
    notice(f"checkpoint {done.checkpoint} of {done.session_id}: {human_bytes(done.file_bytes)}, {how}")
    if done.children:
        notice(f"the sessions that it began are not in it; there it finds them forgotten: {', '.join(done.children)}")


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `torpor snapshot export` wrote.")],
    passphrase_file: Annotated[Path | None, PASSPHRASE] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Also where it can't be restored, to read the log and pull the files.")
    ] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Bring a session here, to be resumed with `torpor resume`.

    Refused where the image could not be restored: another runsc, a CPU that lacks something, another root image. The
    session keeps its id. Resume only one of the two, here or there: neither knows of the other.
    """
    passphrase = _passphrase(passphrase_file)

    async def work() -> Imported:
        async with open_node() as node:
            with progress_bars() as progress:
                return await import_snapshot(
                    node.runtime, file, passphrase, node.holder, wire.answers, progress, anyway=anyway
                )

    done = asyncio.run(work())
    if json:
        print_json(asdict(done))
        return
    typer.echo(done.session_id)
    if done.unmet:
        err.print(f"It can be read, not resumed: {done.unmet}", markup=False)


def _passphrase(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        passphrase = file.read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise InvalidInput("passphrase_unusable", f"cannot read passphrase {file}: {error.strerror}") from error
    if not passphrase:
        raise InvalidInput("passphrase_unusable", f"cannot use passphrase {file}: it is empty")
    return passphrase
