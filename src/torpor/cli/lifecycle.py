"""Commands that change a session from outside: checkpoint, kill, rm. They ask its node, or act when it has none."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Annotated, Any

import typer

from torpor import wire
from torpor.cli.printer import err, human_bytes, milliseconds, notice, out, print_json
from torpor.core.errors import Conflict
from torpor.core.ids import SessionId
from torpor.core.session import ENDED, SessionStatus
from torpor.db import children
from torpor.db.children import OnCancel
from torpor.db.sessions import Session
from torpor.node import ANSWER_SECONDS, Node, open_node, socket_of
from torpor.runtime.leasing import wait_until_free

SESSION = typer.Argument(metavar="SESSION", help="Id, unique beginning of an id, or name.")
JSON = typer.Option("--json", help="Print the result as JSON.")


def register(app: typer.Typer) -> None:
    app.command("checkpoint")(checkpoint)
    app.command("kill")(kill)
    app.command("stop")(stop)
    app.command("rm")(remove)


def checkpoint(
    session: Annotated[str, SESSION],
    pin: Annotated[bool, typer.Option("--pin", help="Keep it whatever retention says.")] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Make a checkpoint of a running session now, and wait until it is durable."""
    result = asyncio.run(_ask_node(session, "checkpoint", pin=pin))
    if json:
        print_json(result)
        return
    froze, stored = milliseconds(result["freeze_ns"]), human_bytes(result["stored_bytes"])
    out.print(f"checkpoint {result['number']}: the agent stood still for {froze}, {stored} stored")


def kill(session: Annotated[str, SESSION], json: Annotated[bool, JSON] = False) -> None:
    """End a session for good: its sandbox is destroyed, its log, checkpoints and files stay until `torpor rm`."""

    async def work() -> Session:
        async with open_node() as node:
            found = await node.runtime.session(session)
            await _kill(node, found.session_id)
            now = await node.runtime.session(found.session_id)
            if now.status is SessionStatus.CANCELLED:
                killed.extend(await _kill_children(node, now.session_id))
            return now

    killed: list[str] = []
    now = asyncio.run(work())
    for child in killed:
        notice(f"{child} killed with it")
    if now.status is SessionStatus.CANCELLED:
        notice(f"{now.session_id} killed; `torpor log` and `torpor pull` still work, `torpor rm` forgets it")
    else:
        notice(f"{now.session_id} had {now.status} before")
    if json:
        print_json({"killed": now.session_id, "status": now.status.value, "children": killed})


async def _kill(node: Node, session_id: SessionId) -> None:
    if await node.ask(session_id, "kill") is not None:
        await wait_until_free(node.runtime.home.lock(session_id))
    else:
        await node.runtime.cancel(session_id, node.holder, wire.answers)


async def _kill_children(node: Node, session_id: SessionId) -> list[str]:
    """Kill what a cancelled session began and did not detach, down to the last; to be called again after a crash."""
    killed: list[str] = []
    for child in await node.runtime.database.read(lambda tx: children.list_of(tx, session_id)):
        if child.on_cancel is OnCancel.DETACH:
            continue
        if not child.has_ended:
            await _kill(node, child.session.session_id)
            killed.append(child.session.session_id)
        killed += await _kill_children(node, child.session.session_id)
    return killed


def stop(
    session: Annotated[str, SESSION],
    at_once: Annotated[
        bool, typer.Option("--now", help="Do not wait for an answer that is arriving: it is asked for, and paid, anew.")
    ] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Checkpoint a running session, free its sandbox and end its node; `torpor resume` goes on from there.

    An answer of a model that is arriving is waited for, at most a minute.
    """

    async def work() -> tuple[Session, int]:
        async with open_node() as node:
            found = await node.runtime.session(session)
            await ask_running(node, found, "stop", **({"now": True} if at_once else {}))
            await wait_until_free(node.runtime.home.lock(found.session_id))
            newest = await node.runtime.newest_checkpoint(found.session_id)
            return await node.runtime.session(found.session_id), newest.number

    told = "putting it to sleep" if at_once else "waiting for an answer that is arriving, and putting it to sleep"
    with err.status(told):
        now, checkpoint = asyncio.run(work())
    if now.status is SessionStatus.ASLEEP:
        notice(f"{now.session_id} stopped at checkpoint #{checkpoint}; `torpor resume` goes on from there")
    else:
        notice(f"{now.session_id} is over before it was stopped: it has {now.status}")
    if json:
        print_json({"stopped": now.session_id, "status": now.status.value, "checkpoint": checkpoint})


def remove(session: Annotated[str, SESSION], json: Annotated[bool, JSON] = False) -> None:
    """Forget a session: its log, its checkpoints and its files. Refused while a node runs it."""

    async def work() -> Session:
        async with open_node() as node:
            found = await node.runtime.session(session)
            await node.runtime.remove(found.session_id, node.holder, wire.answers)
            return found

    removed = asyncio.run(work())
    notice(f"{removed.session_id} removed, with its log of {removed.head_seq} events and its files")
    if json:
        print_json({"removed": removed.session_id})


async def _ask_node(session: str, verb: str, **arguments: object) -> dict[str, Any]:
    async with open_node() as node:
        return await ask_running(node, await node.runtime.session(session), verb, **arguments)


async def ask_running(node: Node, session: Session, verb: str, **arguments: object) -> dict[str, Any]:
    """Ask the node that runs a session.

    Raises:
        Conflict: `session_not_running`.
    """
    answer = await node.ask(session.session_id, verb, **arguments)
    if answer is None:
        raise _not_running(session)
    return answer


Opened = contextlib.AbstractAsyncContextManager[tuple[asyncio.StreamReader, asyncio.StreamWriter]]


def opener(node: Node, session: Session) -> Callable[[str], Opened]:
    """Opens workers, by their names, in the sandbox of a session that a node runs.

    Raises:
        Conflict: `session_not_running`.
    """
    socket = socket_of(node.runtime.home.lock(session.session_id))
    if socket is None:
        raise _not_running(session)
    return lambda worker: wire.open_channel(
        socket, "work", deadline_seconds=ANSWER_SECONDS, session=session.session_id, worker=worker
    )


def _not_running(session: Session) -> Conflict:
    return Conflict(
        "session_not_running",
        f"cannot reach session {session.session_id}: no node runs it",
        hint=f"It has {session.status}: `torpor output` and `torpor pull` have what it left."
        if session.status in ENDED
        else f"`torpor resume {session.name or session.session_id}` goes on with it.",
    )
