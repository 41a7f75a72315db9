"""Commands that only read: ls, show, checkpoints, output, diff, pull. None of them needs or disturbs a node."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from torpor.cli import timeline
from torpor.cli.costs import standing
from torpor.cli.printer import (
    cell,
    err,
    human_age,
    human_bytes,
    milliseconds,
    moment,
    out,
    print_json,
    print_rows,
    printable,
)
from torpor.core.call import Call, CallState
from torpor.core.checkpoint import Checkpoint
from torpor.core.clock import SystemClock
from torpor.core.errors import InvalidInput
from torpor.core.events import Kind
from torpor.core.ids import CallId
from torpor.core.money import dollars_text
from torpor.core.session import ENDED, MAY_HOLD_SANDBOX
from torpor.core.way_back import way_back
from torpor.db import budgets, calls, checkpoints, log, outputs, sessions
from torpor.runtime.leasing import is_held, read_holder
from torpor.runtime.runtime import Runtime, open_runtime
from torpor.runtime.staging import Staging

T = TypeVar("T")
SESSION = typer.Argument(metavar="SESSION", help="Id, unique beginning of an id, or name.")
JSON = typer.Option("--json", help="One JSON object a line.")


def register(app: typer.Typer) -> None:
    app.command("ls", short_help="List sessions.")(ls)
    app.command("show", short_help="Show one session.")(show)
    app.command("log", short_help="The session's timeline, or its events.")(timeline.log)
    app.command("output", short_help="What the agent wrote to stdout and stderr.")(output)
    app.command("checkpoints", short_help="List a session's checkpoints.")(list_checkpoints)
    app.command("diff", short_help="What the session changed in its workspace.")(diff)
    app.command("pull", short_help="Bring the session's workspace back.")(pull)


def with_runtime(work: Callable[[Runtime], Awaitable[T]]) -> T:
    """Run one piece of work on an open runtime."""

    async def opened() -> T:
        async with open_runtime(os.environ, SystemClock()) as runtime:
            return await work(runtime)

    return asyncio.run(opened())


def ls(json: Annotated[bool, JSON] = False) -> None:
    """List all sessions, newest first.

    A session that says `running` without a node has lost it: `torpor resume` goes on with it.
    """

    async def work(runtime: Runtime) -> list[dict[str, Any]]:
        found = await runtime.database.read(sessions.list_newest)
        spent = await runtime.database.read(budgets.costs)
        return [_row(runtime, session, spent.get(session.session_id)) for session in found]

    columns = ("session", "name", "status", "node", "tier", "age", "events", "cost", "command")
    print_rows(with_runtime(work), columns, as_json=json, empty="no sessions yet: torpor run -- CMD")


def show(session: Annotated[str, SESSION], json: Annotated[bool, JSON] = False) -> None:
    """Show one session: its status, its node, its calls and checkpoints, and how far back a crash would go."""

    async def work(runtime: Runtime) -> dict[str, Any]:
        found = await runtime.session(session)
        points = await runtime.database.read(lambda tx: checkpoints.list_intact(tx, found.session_id))
        made = await runtime.database.read(lambda tx: calls.load_calls(tx, found.session_id))
        newest = max(points, key=lambda point: point.seq, default=None)
        spent = await runtime.database.read(budgets.costs)
        state = await runtime.database.read(lambda tx: standing(tx, found.session_id))
        counts = await runtime.database.read(lambda tx: log.counts(tx, found.session_id))
        return _row(runtime, found, spent.get(found.session_id)) | {
            "incarnation": found.incarnation,
            "calls": len(made),
            "attempts": sum(len(call.attempts) for call in made),
            **{name: state[name] for name in ("budget", "spent", "reserved", "waits_on", "hint")},
            "checkpoints": len(points),
            "newest_checkpoint": newest.number if newest else None,
            "checkpointed_ns": newest.wall_ns if newest else None,
            "events_since_checkpoint": found.head_seq - newest.seq if newest else None,
            **_crash(runtime, found, points, made),
            "turns_skipped": counts[Kind.CHECKPOINT_SKIPPED],
            "checkpoints_overtaken": counts[Kind.CHECKPOINT_OVERTAKEN],
            **_in_memory(runtime, found, points),
            "stored_bytes": sum(point.stored_bytes for point in points),
            "exit_status": found.exit_status,
            "workspace_source": found.spec.get("workspace_source"),
            "image": found.spec.get("image", {}).get("name"),
        }

    fields = with_runtime(work)
    if json:
        print_json(fields)
        return
    del fields["age"]
    for name, value in fields.items():
        out.print(f"{name.removesuffix('_ns').replace('_', ' '):>24}  {_shown(name, value)}", markup=False)


def list_checkpoints(session: Annotated[str, SESSION], json: Annotated[bool, JSON] = False) -> None:
    """List a session's checkpoints, oldest first: when, why, how long the agent stood still, what they cost."""

    async def work(runtime: Runtime) -> list[Checkpoint]:
        found = await runtime.session(session)
        return await runtime.database.read(lambda tx: checkpoints.list_intact(tx, found.session_id))

    rows = [
        {
            "number": point.number,
            "seq": point.seq,
            "reason": point.reason,
            "incarnation": point.incarnation,
            "open_calls": len(point.open_streams),
            "froze": milliseconds(point.freeze_ns),
            "committed_in": milliseconds(point.commit_ns),
            "image": human_bytes(point.raw_bytes),
            "stored": human_bytes(point.stored_bytes),
            "freeze_ns": point.freeze_ns,
            "commit_ns": point.commit_ns,
            "raw_bytes": point.raw_bytes,
            "stored_bytes": point.stored_bytes,
            "wall_ns": point.wall_ns,
            "snapshot": point.snapshot_id,
        }
        for point in with_runtime(work)
    ]
    columns = ("number", "seq", "reason", "incarnation", "open_calls", "froze", "committed_in", "image", "stored")
    print_rows(rows, columns, as_json=json, empty="no checkpoints")


def output(
    session: Annotated[str, SESSION],
    stderr: Annotated[bool, typer.Option("--stderr", help="Its stderr instead of its stdout.")] = False,
) -> None:
    """Print what the agent wrote, byte for byte, each byte once however often it was restored."""

    async def work(runtime: Runtime) -> bytes:
        found = await runtime.session(session)
        return await runtime.database.read(lambda tx: outputs.read(tx, found.session_id, 2 if stderr else 1))

    sys.stdout.buffer.write(with_runtime(work))
    sys.stdout.buffer.flush()


def diff(session: Annotated[str, SESSION], json: Annotated[bool, JSON] = False) -> None:
    """List the files that the session added, changed or removed, up to its newest checkpoint."""

    async def work(runtime: Runtime) -> list[dict[str, Any]]:
        found = await runtime.session(session)
        changes = await runtime.diff(found.session_id)
        return [{"what": change.what, "path": os.fsdecode(change.path)} for change in changes]

    marks = {"added": "[green]+[/green]", "removed": "[red]-[/red]", "changed": "[yellow]~[/yellow]"}
    for row in with_runtime(work):
        if json:
            print_json(row)
        else:
            out.print(marks.get(row["what"], "?"), end=" ")
            out.print(printable(row["path"]), markup=False)


def pull(
    session: Annotated[str, SESSION],
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Where to (default: where the workspace came from).")
    ] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Lay the files of the session's newest checkpoint over a directory. Nothing there is removed.

    Points out files that could make this machine run code of the agent's (.git/hooks, .envrc, ...).
    """

    async def work(runtime: Runtime) -> tuple[Path, Any]:
        found = await runtime.session(session)
        target = directory or Path(str(found.spec.get("workspace_source", "")))
        if not str(target):
            raise InvalidInput("directory_needed", "cannot pull: say where to")
        return target, await runtime.pull(found.session_id, target)

    target, report = with_runtime(work)
    risky = [os.fsdecode(path) for path in report.run_by_host]
    if json:
        print_json({"directory": str(target), "written": len(report.written), "run_by_host": risky})
        return
    out.print(f"{len(report.written)} files written to {target}", markup=False)
    for path in risky:
        err.print("[yellow]look at it before you go on:[/yellow] ", end="")
        err.print(printable(path), markup=False)


def _row(runtime: Runtime, session: sessions.Session, cost_nanousd: int | None) -> dict[str, Any]:
    lock = runtime.home.lock(session.session_id)
    holder = read_holder(lock) if is_held(lock) else None
    node = f"pid {holder.pid}" if holder else ("none: resume it" if session.status in MAY_HOLD_SANDBOX else "")
    age = (runtime.clock.wall_ns() - session.created_ns) / 1e9
    return {
        "session": session.session_id,
        "name": session.name,
        "status": session.status.value,
        "node": node,
        "tier": _tier(runtime, session),
        "age": human_age(age),
        "events": session.head_seq,
        "cost": None if cost_nanousd is None else dollars_text(cost_nanousd),
        "command": " ".join(session.spec.get("argv", ())),
        "created_ns": session.created_ns,
    }


def _tier(runtime: Runtime, session: sessions.Session) -> str | None:
    """Where the session's memory is, from the quickest to go on with to the slowest: sandbox, memory, store."""
    if session.status in ENDED:
        return None
    if session.status in MAY_HOLD_SANDBOX:
        return "sandbox"
    return "memory" if Staging(runtime.home.root, session.session_id).images() else "store"


def _crash(
    runtime: Runtime, session: sessions.Session, points: Sequence[Checkpoint], made: Sequence[Call]
) -> dict[str, Any]:
    """How far back a crash would go now; of a session that does not run, nothing would."""
    has_node = is_held(runtime.home.lock(session.session_id))
    by_id = {call.call_id: call for call in made}

    def pump_alive(call_id: CallId) -> bool:
        return has_node and by_id[call_id].state is CallState.SENT

    back = way_back(points, by_id, pump_alive) if session.status in MAY_HOLD_SANDBOX else None
    seconds = max(0, runtime.clock.wall_ns() - back.checkpoint.wall_ns) // 1_000_000_000 if back else None
    return {
        "crash_goes_back_to": back.checkpoint.number if back else None,
        "crash_undoes_turns": back.turns if back else None,
        "crash_undoes_seconds": seconds,
        "crash_calls_from_log": back.calls_from_log if back else None,
    }


def _in_memory(runtime: Runtime, session: sessions.Session, points: Sequence[Checkpoint]) -> dict[str, Any]:
    """The session's images in memory; those that no checkpoint names wait for the store, as long as a node is there."""
    images = Staging(runtime.home.root, session.session_id).images()
    stored = {point.snapshot_id for point in points}
    has_node = is_held(runtime.home.lock(session.session_id))
    return {
        "waiting_for_the_store": len(images.keys() - stored) if has_node else 0,
        "in_memory_bytes": sum(images.values()),
    }


def _shown(name: str, value: Any) -> str:
    """A field of `show` for people."""
    if isinstance(value, int) and name.endswith("_ns"):
        return moment(value, SystemClock().wall_ns())
    if isinstance(value, int) and name.endswith("_bytes"):
        return human_bytes(value)
    return cell(value)
