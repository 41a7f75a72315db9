"""`torpor export` and `torpor import`: a session's context as a file, and as OpenTelemetry spans."""

import asyncio
import json as jsonlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from torpor import __version__, wire
from torpor.cli.printer import err, out, print_json
from torpor.cli.reading import JSON, SESSION, with_runtime
from torpor.core.errors import InvalidInput
from torpor.node import open_node
from torpor.runtime import spans, transfer
from torpor.runtime.runtime import Runtime


def register(app: typer.Typer) -> None:
    app.command("export")(export)
    app.command("import")(import_)


def export(
    session: Annotated[str, SESSION],
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="Where to (default: stdout).")] = None,
    otel: Annotated[str | None, typer.Option(metavar="URL", help="Send spans to this OTLP endpoint (HTTP).")] = None,
    otel_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Write spans to this file instead.")] = None,
    contents: Annotated[bool, typer.Option("--contents", help="Spans with prompts, arguments, results.")] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Write everything of a session but its snapshots, one JSON object a line: `torpor import` reads it.

    It holds what the models saw, unencrypted. Redact first what must not leave.
    """

    async def work(runtime: Runtime) -> dict[str, Any]:
        found = await runtime.session(session)
        if otel is not None or otel_file is not None:
            root = await runtime.database.read(lambda tx: spans.session_spans(tx, found.session_id, contents=contents))
            count = spans.send_spans(root, endpoint=otel, path=otel_file, version=__version__)
            return {"session": found.session_id, "spans": count}
        lines = await runtime.database.read(lambda tx: _write(file, transfer.export_lines(tx, found.session_id)))
        return {"session": found.session_id, "lines": lines}

    fields = with_runtime(work)
    if json and (file is not None or "spans" in fields):
        print_json(fields)
    elif "spans" in fields:
        out.print(f"{fields['spans']} spans")
    elif file is not None:
        err.print(f"{fields['lines']} lines")


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `torpor export` wrote; - is stdin.")],
    json: Annotated[bool, JSON] = False,
) -> None:
    """Bring an exported session back: log, requests, answers and output, checked like `torpor log --verify`.

    It can be read and searched. It has no snapshots, so it can't be resumed.
    """

    async def work() -> str:
        async with open_node() as node:
            with _opened(file) as lines:
                return await node.runtime.import_session(lines, node.holder, wire.answers)

    session_id = asyncio.run(work())
    if json:
        print_json({"session": session_id})
    else:
        typer.echo(session_id)


def _write(file: Path | None, lines: Iterator[dict[str, Any]]) -> int:
    """One object a line, to a file that nobody else can read; returns how many."""
    if file is None:
        return sum(sys.stdout.write(jsonlib.dumps(line) + "\n") > 0 for line in lines)
    with open(file, "w", opener=_private) as target:
        return sum(target.write(jsonlib.dumps(line) + "\n") > 0 for line in lines)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _opened(file: Path) -> Any:
    if str(file) == "-":
        return sys.stdin
    try:
        return file.open()
    except OSError as error:
        raise InvalidInput("import_unreadable", f"cannot import {file}: {error.strerror}") from error
