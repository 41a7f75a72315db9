"""Commands that only read: ls, show, checkpoints, output, diff, pull. None of them needs or disturbs a node."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from torpor.cli.printer import (
    cell,
    err,
    human_age,
    human_bytes,
    milliseconds,
    moment,
    notice,
    out,
    print_json,
    print_rows,
    printable,
)
from torpor.cli.whereabouts import Whereabouts, look_around
from torpor.core.clock import SystemClock
from torpor.core.errors import InvalidInput
from torpor.core.ids import SessionId
from torpor.core.money import dollars_text
from torpor.core.session import ENDED, MAY_HOLD_SANDBOX
from torpor.core.waitpoint import Waitpoint, WaitpointKind
from torpor.db import budgets, sessions, waitpoints
from torpor.db.database import Transaction
from torpor.db.log import EVERYTHING
from torpor.runtime.leasing import is_held
from torpor.runtime.reader import Reader, open_reader
from torpor.runtime.staging import Staging

if TYPE_CHECKING:
    from torpor.core.call import Call
    from torpor.core.checkpoint import Checkpoint
    from torpor.core.ids import CallId
    from torpor.runtime.runtime import Runtime

T = TypeVar("T")
SESSION = typer.Argument(metavar="SESSION", help="Id, unique beginning of an id, or name.")
JSON = typer.Option("--json", help="One JSON object a line.")
SHOWN_AT_MOST = 100


def register(app: typer.Typer) -> None:
    app.command("ls")(ls)
    app.command("show")(show)
    app.command("output")(output)
    app.command("checkpoints")(list_checkpoints)
    app.command("diff")(diff)
    app.command("pull")(pull)


def with_reader(work: Callable[[Reader], Awaitable[T]]) -> T:
    """Run one piece of work on rows of sessions alone."""

    async def opened() -> T:
        async with open_reader(os.environ, SystemClock()) as reader:
            return await work(reader)

    return asyncio.run(opened())


def with_runtime(work: Callable[["Runtime"], Awaitable[T]]) -> T:
    """Run one piece of work on an open runtime."""
    from torpor.runtime.runtime import open_runtime

    async def opened() -> T:
        async with open_runtime(os.environ, SystemClock()) as runtime:
            return await work(runtime)

    return asyncio.run(opened())


def ls(
    every: Annotated[bool, typer.Option("--all", "-a", help=f"All of them, not the newest {SHOWN_AT_MOST}.")] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """List sessions, newest first.

    A session that says `running` without a node has lost it: `torpor resume` goes on with it. As JSON they are always
    all there.
    """

    async def work(reader: Reader) -> list[dict[str, Any]]:
        limit = EVERYTHING if every or json else SHOWN_AT_MOST + 1
        found = await reader.database.read(lambda tx: sessions.list_newest(tx, limit=limit))
        spent = await reader.database.read(budgets.costs)
        around = await look_around(reader, found)
        return [_row(reader, around, session, spent.get(session.session_id)) for session in found]

    rows = with_reader(work)
    shown = rows if every or json else rows[:SHOWN_AT_MOST]
    columns = ("session", "name", "status", "node", "tier", "age", "events", "cost", "command")
    print_rows(shown, columns, as_json=json, empty="no sessions yet: torpor run -- CMD")
    if len(rows) > len(shown):
        notice(f"these are the newest {SHOWN_AT_MOST}; --all lists all")


def show(session: Annotated[str, SESSION], json: Annotated[bool, JSON] = False) -> None:
    """Show one session: its status, its node, its calls and checkpoints, and how far back a crash would go."""
    from torpor.core.checkpoint import cut_order
    from torpor.core.events import Kind
    from torpor.db import calls, checkpoints, log

    async def work(reader: Reader) -> dict[str, Any]:
        found = await reader.session(session)
        points = await reader.database.read(lambda tx: checkpoints.list_intact(tx, found.session_id))
        made = await reader.database.read(lambda tx: calls.load_calls(tx, found.session_id))
        newest = max(points, key=cut_order, default=None)
        spent = await reader.database.read(budgets.costs)
        state = await reader.database.read(lambda tx: standing(tx, found.session_id))
        counts = await reader.database.read(lambda tx: log.counts(tx, found.session_id))
        around = await look_around(reader, [found])
        return _row(reader, around, found, spent.get(found.session_id)) | {
            "incarnation": found.incarnation,
            "calls": len(made),
            "attempts": sum(len(call.attempts) for call in made),
            **{name: state[name] for name in ("budget", "spent", "reserved", "waits_on", "hint")},
            "checkpoints": len(points),
            "newest_checkpoint": newest.number if newest else None,
            "checkpointed_ns": newest.wall_ns if newest else None,
            "events_since_checkpoint": found.head_seq - newest.seq if newest else None,
            **_crash(reader, found, points, made),
            "turns_skipped": counts[Kind.CHECKPOINT_SKIPPED],
            "checkpoints_overtaken": counts[Kind.CHECKPOINT_OVERTAKEN],
            **_in_memory(reader, found, points),
            "stored_bytes": sum(point.stored_bytes for point in points),
            "exit_status": found.exit_status,
            "parent": found.parent.session_id if found.parent else None,
            "forked_at_seq": found.parent.seq if found.parent else None,
            "workspace_source": found.spec.get("workspace_source"),
            "image": found.spec.get("image", {}).get("name"),
        }

    fields = with_reader(work)
    if json:
        print_json(fields)
        return
    del fields["age"]
    for name, value in fields.items():
        out.print(f"{name.removesuffix('_ns').replace('_', ' '):>24}  {_shown(name, value)}", markup=False)


def list_checkpoints(session: Annotated[str, SESSION], json: Annotated[bool, JSON] = False) -> None:
    """List a session's checkpoints, oldest first: when, why, how long the agent stood still, what they cost.

    LEFT is the event of the rewind that left one: no recovery goes back to it, a fork may begin there.
    """
    from torpor.db import checkpoints

    async def work(reader: Reader) -> tuple[list["Checkpoint"], dict[int, int]]:
        session_id = (await reader.session(session)).session_id
        return await reader.database.read(
            lambda tx: (
                checkpoints.list_intact(tx, session_id, branches=True),
                checkpoints.list_left(tx, session_id),
            )
        )

    points, left = with_reader(work)
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
            "left": left.get(point.number),
        }
        for point in points
    ]
    columns = ("number", "seq", "reason", "incarnation", "open_calls", "froze", "committed_in", "image", "stored")
    columns += ("left",) if left else ()
    print_rows(rows, columns, as_json=json, empty="no checkpoints")


def output(
    session: Annotated[str, SESSION],
    stderr: Annotated[bool, typer.Option("--stderr", help="Its stderr instead of its stdout.")] = False,
) -> None:
    """Print what the agent wrote, byte for byte, each byte once however often it was restored."""
    from torpor.db import outputs

    async def work(reader: Reader) -> bytes:
        found = await reader.session(session)
        return await reader.database.read(lambda tx: outputs.read(tx, found.session_id, 2 if stderr else 1))

    sys.stdout.buffer.write(with_reader(work))
    sys.stdout.buffer.flush()


def diff(session: Annotated[str, SESSION], json: Annotated[bool, JSON] = False) -> None:
    """List the files that the session added, changed or removed, up to its newest checkpoint."""

    async def work(runtime: "Runtime") -> list[dict[str, Any]]:
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

    async def work(runtime: "Runtime") -> tuple[Path, Any]:
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


def standing(tx: Transaction, session_id: SessionId) -> dict[str, Any]:
    """Where a session stands with its budget, what it waits on, and what a person can do about that."""
    session = sessions.get(tx, session_id)
    account = budgets.account(tx, session_id)
    points = [] if session.status in ENDED else waitpoints.open_waitpoints(tx, session_id)
    return {
        "session": session_id,
        "budget": None if account.limit is None else dollars_text(account.limit),
        "spent": dollars_text(account.spent),
        "reserved": dollars_text(account.reserved),
        "waits_on": [_waited_on(tx, point) for point in points],
        "hint": _hint(session, points),
    }


def _waited_on(tx: Transaction, point: Waitpoint) -> dict[str, Any]:
    from torpor.db import questions

    told = {"kind": point.kind.value, "call": point.call_id, "waitpoint": point.waitpoint_id}
    if point.kind is WaitpointKind.ASK:
        return {**told, "question": questions.question_of(tx, point).text}
    return {**told, **point.data}


def _hint(session: sessions.Session, points: Sequence[Waitpoint]) -> str:
    """The command that lets it go on."""
    name = session.name or session.session_id
    told = {
        WaitpointKind.BUDGET: f"torpor budget {name} --add DOLLARS lets it go on",
        WaitpointKind.ASK: f"torpor waitpoints {name} shows what it asks, torpor resolve {name} ANSWER answers",
        WaitpointKind.MESSAGE: f"torpor send {name} TEXT is what it waits for",
        WaitpointKind.TIMER: f"torpor resolve {name} lets it go on before its time",
    }
    return told[points[0].kind] if points else ""


def _row(reader: Reader, around: Whereabouts, session: sessions.Session, cost_nanousd: int | None) -> dict[str, Any]:
    age = (reader.clock.wall_ns() - session.created_ns) / 1e9
    return {
        "session": session.session_id,
        "name": session.name,
        "status": session.status.value,
        "node": around.node(session),
        "tier": around.tier(session),
        "age": human_age(age),
        "events": session.head_seq,
        "cost": None if cost_nanousd is None else dollars_text(cost_nanousd),
        "command": " ".join(session.spec.get("argv", ())),
        "created_ns": session.created_ns,
    }


def _crash(
    reader: Reader, session: sessions.Session, points: Sequence["Checkpoint"], made: Sequence["Call"]
) -> dict[str, Any]:
    """How far back a crash would go now; of a session that does not run, nothing would."""
    from torpor.core.call import CallState
    from torpor.core.way_back import way_back

    has_node = is_held(reader.home.lock(session.session_id))
    by_id = {call.call_id: call for call in made}

    def pump_alive(call_id: "CallId") -> bool:
        return has_node and by_id[call_id].state is CallState.SENT

    back = way_back(points, by_id, pump_alive) if session.status in MAY_HOLD_SANDBOX else None
    seconds = max(0, reader.clock.wall_ns() - back.checkpoint.wall_ns) // 1_000_000_000 if back else None
    return {
        "crash_goes_back_to": back.checkpoint.number if back else None,
        "crash_undoes_turns": back.turns if back else None,
        "crash_undoes_seconds": seconds,
        "crash_calls_from_log": back.calls_from_log if back else None,
    }


def _in_memory(reader: Reader, session: sessions.Session, points: Sequence["Checkpoint"]) -> dict[str, Any]:
    """The session's images in memory; those that no checkpoint names wait for the store, as long as a node is there."""
    images = Staging(reader.home.root, session.session_id).images()
    stored = {point.snapshot_id for point in points}
    has_node = is_held(reader.home.lock(session.session_id))
    return {
        "waiting_for_the_store": len(images.keys() - stored) if has_node else 0,
        "in_memory_bytes": sum(images.values()),
    }


def _shown(name: str, value: Any) -> str:
    """A field of `show` for people."""
    if name == "waits_on":
        return "; ".join(printable(f"{on['kind']}: {on.get('question', on['waitpoint'])}") for on in value) or "-"
    if isinstance(value, int) and name.endswith("_ns"):
        return moment(value, SystemClock().wall_ns())
    if isinstance(value, int) and name.endswith("_bytes"):
        return human_bytes(value)
    return cell(value)
