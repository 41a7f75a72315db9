"""`torpor fork`, `rewind` and `tree`: sessions that come from others, and branches of one."""

import asyncio
import sys
from typing import Annotated, Any

import typer

from torpor import wire
from torpor.cli.printer import err, notice, out, print_json, printable
from torpor.cli.progress import progress_bars
from torpor.cli.reading import JSON, SESSION, with_reader
from torpor.cli.running import env_pairs
from torpor.core.ids import SessionId
from torpor.core.session import SessionStatus
from torpor.db.rewinds import Orphans
from torpor.node import Node, open_node
from torpor.runtime.lineage import Branch, Line, counted, draw
from torpor.runtime.reader import Reader

MESSAGE_CHARACTERS_SHOWN = 200
SILENT_COUNT_MAX = 50
"""So many children are made in about a second."""
_ALIVE = frozenset({SessionStatus.RUNNING, SessionStatus.WAITING})
"""A node that has such a session can make a checkpoint of now."""


def register(app: typer.Typer) -> None:
    app.command("fork")(fork)
    app.command("rewind")(rewind)
    app.command("tree")(tree)


def fork(
    session: Annotated[str, SESSION],
    at: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT|turn:N", help="Where the children begin (default: now).")
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="How many.")] = 1,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Told to the children; repeatable.")
    ] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="The first message in each inbox.")] = None,
    resample: Annotated[
        bool, typer.Option("--resample", help="Ask models anew, instead of joining the parent's answers.")
    ] = False,
    asleep: Annotated[
        bool, typer.Option("--asleep", help="Leave the children asleep, although a node daemon runs the session.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="The child's name; of several, each gets a number behind it.")
    ] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Make sessions that begin where this one is, or was: same memory, same files, an identity of their own.

    The children are asleep; `torpor resume` runs one. If a node daemon runs this session, it runs the children as well.
    """
    from torpor.runtime.forking import Forked, Wish
    from torpor.runtime.forking import fork as make

    wish = Wish(
        at=at,
        count=count,
        environment=env_pairs(env or []),
        message=message,
        resample=resample,
        asleep=asleep,
        name=name,
    )

    async def work() -> Forked:
        async with open_node() as node:
            found = await node.runtime.session(session)
            if at is None and found.status in _ALIVE:
                await node.ask(found.session_id, "checkpoint")
            if count > SILENT_COUNT_MAX:
                with progress_bars() as progress:
                    made = await make(node.runtime, found, wish, node.holder, progress)
            else:
                made = await make(node.runtime, found, wish, node.holder)
            await node.ask_daemon("look")
            return made

    made = asyncio.run(work())
    for child in made.children:
        if json:
            print_json({"session": child, "parent": made.parent, "checkpoint": made.checkpoint, "turn": made.turn})
        else:
            typer.echo(child)
    begun = f"from checkpoint {made.checkpoint} of {made.parent}, after {counted(made.turn)}"
    notice(f"{len(made.children)} {begun}")


def rewind(
    session: Annotated[str, SESSION],
    to: Annotated[str, typer.Option(metavar="CHECKPOINT|turn:N", help="Where the session goes back to.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Although something stays done outside.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Take a session back to an earlier point; what it leaves stays in its log, as a branch.

    A running session is stopped first. It is asleep afterwards; `torpor resume` goes on from there, another way: models
    are asked anew. Messages that were handled since are unhandled again. What the session did to the outside since then
    is listed first, and needs a yes.
    """
    from torpor.runtime import rewinding

    async def work() -> rewinding.Rewound:
        async with open_node() as node:
            found = await node.runtime.session(session)
            session_id, goes_on = found.session_id, found.wake_ns is not None
            way = await rewinding.look(node.runtime, session_id, to)
            if way.orphans and not yes:
                _print_orphans(way.orphans, as_json=json)
                if not sys.stdin.isatty() or not typer.confirm("Go back all the same?", err=True):
                    raise rewinding.orphaned(session_id, way.orphans)
            await _stop(node, session_id)
            known = None if yes else way.orphan_names
            runtime, me = node.runtime, node.holder
            done = await rewinding.rewind(runtime, session_id, to, me, wire.answers, known=known, goes_on=goes_on)
            await node.ask_daemon("look")
            return done

    done = asyncio.run(work())
    back = f"back at checkpoint {done.way.origin.checkpoint.number}, in turn {done.way.turn}"
    notice(f"{back}; {counted(done.way.turns_left)} left behind")
    if json:
        print_json(
            {
                "rewound": done.checkpoint.session_id,
                "to": done.way.origin.checkpoint.number,
                "checkpoint": done.checkpoint.number,
                "turn": done.way.turn,
                "turns_left": done.way.turns_left,
            }
        )


async def _stop(node: Node, session_id: SessionId) -> None:
    """Let the node that runs a session put it to sleep: where it stops is the tip of what is left.

    At once: were an answer waited for that is left anyway, the agent might come to its end meanwhile.
    """
    from torpor.runtime.leasing import wait_until_free

    if await node.ask(session_id, "stop", now=True) is not None:
        await wait_until_free(node.runtime.home.lock(session_id))


def _print_orphans(orphans: Orphans, *, as_json: bool) -> None:
    """What a rewind does not undo."""
    for message in orphans.sent:
        if as_json:
            print_json({"orphan": "message", "number": message.number, "text": message.text})
        else:
            err.print(f"sent out: message {message.number}: ", end="", markup=False)
            err.print(printable(message.text[:MESSAGE_CHARACTERS_SHOWN]), markup=False)
    for call in orphans.effects:
        if as_json:
            print_json({"orphan": "request", "call": call.call_id, "method": call.method, "target": call.target})
        else:
            err.print(f"requested: {printable(f'{call.method} {call.target}')}", markup=False)


def tree(session: Annotated[str, SESSION], json: Annotated[bool, JSON] = False) -> None:
    """Draw where a session comes from, what came from it, and the branches that rewinds left."""
    from torpor.runtime.lineage import read_lineage

    async def work(reader: Reader) -> list[Line]:
        found = await reader.session(session)
        return await reader.database.read(lambda tx: read_lineage(tx, found.session_id))

    lines = with_reader(work)
    for line in lines:
        if json:
            print_json(line.fields)
        else:
            _print_line(line)


def _print_line(line: Line) -> None:
    out.print(draw(line), end="", style="dim", markup=False)
    if isinstance(line, Branch):
        out.print(printable(line.told), style="yellow", markup=False)
        return
    out.print(line.session_id, end="", style="bold" if line.is_meant else "", markup=False)
    told: list[Any] = [line.name, line.status, counted(line.turns), line.begins]
    out.print("  " + "  ".join(printable(str(one)) for one in told if one), markup=False)
