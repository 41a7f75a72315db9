"""Commands about the snapshot store: collect, verify, pin, unpin. What they write of a session goes by its node."""

import asyncio
import os
from dataclasses import asdict
from typing import Annotated, Any

import typer

from torpor import wire
from torpor.cli.printer import err, human_bytes, notice, out, print_json, printable
from torpor.cli.progress import progress_bars
from torpor.config import read_grace_seconds
from torpor.core.clock import SystemClock
from torpor.core.errors import Conflict, Damaged, InvalidInput
from torpor.node import open_node
from torpor.runtime.collecting import CollectOptions, CollectReport
from torpor.runtime.runtime import open_runtime
from torpor.runtime.verifying import StoreReport, verify_store

JSON = typer.Option("--json", help="Print the result as JSON.")
POINT = typer.Argument(metavar="SESSION@N", help="A session, and the number of one of its checkpoints.")


def register(app: typer.Typer) -> None:
    app.command("collect")(collect)
    app.command("verify")(verify)
    app.command("pin")(pin)
    app.command("unpin")(unpin)


def collect(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and change nothing.")] = False,
    grace: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="How old garbage has to be (default: an hour).")
    ] = None,
    repack: Annotated[bool, typer.Option(help="Also write packs anew that are mostly dead.")] = True,
    forget_damaged: Annotated[
        bool, typer.Option("--forget-damaged", help="Give up on checkpoints whose manifests can't be read.")
    ] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Forget checkpoints that retention does not keep, and free what no checkpoint needs any more.

    Safe while sessions run. A session that a node runs is left to that node.
    """

    async def work() -> CollectReport:
        async with open_node() as node:
            runtime = node.runtime
            options = CollectOptions(
                grace_seconds=read_grace_seconds(runtime.home.root) if grace is None else grace,
                dry_run=dry_run,
                repack=repack,
                forget_damaged=forget_damaged,
            )
            with progress_bars() as progress:
                return await runtime.collect(options, node.holder, wire.ask, progress)

    report = asyncio.run(work())
    if json:
        print_json({"dry_run": dry_run, **asdict(report), "left": sorted(report.left)})
        return
    for line in _told(report, dry_run=dry_run):
        out.print(line, markup=False)
    if report.note:
        err.print(printable(report.note), markup=False)


def verify(
    session: Annotated[
        str | None,
        typer.Argument(metavar="SESSION", help="Only this session's checkpoints (default: all, and the rest)."),
    ] = None,
    read_data: Annotated[bool, typer.Option("--read-data", help="Read every byte of every pack.")] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Check that every checkpoint would restore, and that every object is needed or garbage. Changes nothing.

    The event log has a check of its own: `torpor log --verify`.
    """

    async def work() -> StoreReport:
        async with open_runtime(os.environ, SystemClock()) as runtime:
            session_id = None if session is None else (await runtime.session(session)).session_id
            with progress_bars() as progress:
                return await verify_store(
                    runtime.database, runtime.stores, runtime.blobs, session_id, progress, read_data=read_data
                )

    report = asyncio.run(work())
    if json:
        print_json(asdict(report))
    for problem in () if json else report.problems:
        whose = problem.session_id or "the store"
        at = f"@{problem.checkpoint}" if problem.checkpoint is not None else ""
        err.print(printable(f"{whose}{at}: {problem.text}"), markup=False)
    if report.problems:
        raise Damaged(
            "store_damaged",
            f"cannot trust the snapshot store: {len(report.problems)} problems",
            hint="Put back what is missing from a copy of the store; other checkpoints of these sessions may restore.",
        )
    if not json:
        how = "every byte was read" if read_data else "--read-data reads every byte"
        out.print(f"{report.checkpoints} checkpoints of {report.packs} packs are whole, {report.blobs} bodies; {how}")
        if report.garbage:
            out.print(f"{report.garbage} objects ({human_bytes(report.garbage_bytes)}) are garbage: torpor collect")


def pin(point: Annotated[str, POINT], json: Annotated[bool, JSON] = False) -> None:
    """Keep a checkpoint whatever the retention policy says, until it is unpinned."""
    _set_pin(point, is_pinned=True, json=json)


def unpin(point: Annotated[str, POINT], json: Annotated[bool, JSON] = False) -> None:
    """Leave a checkpoint to the retention policy again."""
    _set_pin(point, is_pinned=False, json=json)


def _set_pin(point: str, *, is_pinned: bool, json: bool) -> None:
    session, number = parse_point(point)
    if number is None:
        raise InvalidInput("checkpoint_unclear", f"cannot pin {point!r}: say which checkpoint", hint="SESSION@N")

    async def work() -> dict[str, Any]:
        async with open_node() as node:
            found = await node.runtime.session(session)
            if await node.ask(found.session_id, "pin", number=number, pinned=is_pinned) is None:
                async with node.runtime.holding(node.holder, wire.ask).owned(found.session_id) as records:
                    if records is None:
                        raise Conflict(
                            "session_running",
                            f"cannot pin a checkpoint of session {found.session_id}: a node has just taken it",
                            hint="Try again.",
                        )
                    await records.pin(number, is_pinned=is_pinned)
            return {"session": found.session_id, "checkpoint": number, "pinned": is_pinned}

    done = asyncio.run(work())
    if json:
        print_json(done)
    else:
        notice(f"checkpoint {number} of {done['session']} is {'pinned' if is_pinned else 'no longer pinned'}")


def parse_point(text: str) -> tuple[str, int | None]:
    """A session and the number of a checkpoint, if one is said.

    Raises:
        InvalidInput: `checkpoint_unclear`.
    """
    session, at, number = text.partition("@")
    if not at:
        return session, None
    if not number.isdecimal():
        raise InvalidInput(
            "checkpoint_unclear", f"cannot read {text!r}: what follows the @ is no number", hint="For example tour@12."
        )
    return session, int(number)


def _told(report: CollectReport, *, dry_run: bool) -> list[str]:
    """The report for people, most important first."""
    would = "would be " if dry_run else ""
    lines = [f"{human_bytes(report.freed_bytes)} {would}freed: {report.manifests} snapshots, {report.packs} packs"]
    if report.blobs:
        lines[0] += f", {report.blobs} bodies"
    if report.forgotten or report.damaged:
        lines.append(f"{report.forgotten + report.damaged} checkpoints {would}forgotten")
    if report.moved:
        images = f" and {report.images} images laid side by side" if report.images else ""
        lines.append(f"{report.repacked} packs repacked{images}: {human_bytes(report.written_bytes)} written")
    if report.young_bytes:
        lines.append(f"{human_bytes(report.young_bytes)} more is garbage, and too young to go")
    if report.left:
        lines.append(f"{len(report.left)} sessions are left to the nodes that run them")
    return lines
