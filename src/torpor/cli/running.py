"""`torpor run` and `torpor resume`: this process, or a detached one, becomes the node of a session."""

import asyncio
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from torpor import wire
from torpor.cli.printer import err, notice, print_json
from torpor.core.divergence import OnDivergence
from torpor.core.errors import Conflict, InvalidInput
from torpor.core.ids import SessionId
from torpor.core.ladder import OnLost
from torpor.core.memory import parse_memory
from torpor.core.money import parse_dollars
from torpor.core.pacing import parse_share
from torpor.core.restart import parse_restart
from torpor.core.session import SessionStatus
from torpor.node import Node, open_node, upstreams_digest
from torpor.runtime.records import Records
from torpor.runtime.request import Request
from torpor.runtime.watcher import Outcome, Watcher

EXIT_STOPPED, EXIT_KILLED = 79, 137
"""What `run` and `resume` exit with when the agent has no status: it sleeps, or was ended from outside."""


class TerminalWatcher(Watcher):
    """The agent's output is this process's own; notices go to stderr."""

    def output(self, channel: int, data: bytes) -> None:
        stream = sys.stdout if channel == 1 else sys.stderr
        try:
            stream.buffer.write(data)
            stream.buffer.flush()
        except BrokenPipeError:
            # Whoever read our output is gone; the session is not theirs to end. `torpor output` has all of it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    def notice(self, text: str) -> None:
        notice(text)


def register(app: typer.Typer) -> None:
    app.command("run", context_settings={"allow_interspersed_args": False})(run)
    app.command("resume")(resume)


def run(
    command: Annotated[list[str], typer.Argument(metavar="-- CMD", help="The agent's command.")],
    name: Annotated[str | None, typer.Option(help="A name to use instead of the session's id.")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Run in the background; print the id.")] = False,
    image: Annotated[
        str, typer.Option(help="`host`: a read-only, curated view of this machine; or the directory of a root.")
    ] = "host",
    workspace: Annotated[
        Path | None, typer.Option(help="Directory copied to the session's /workspace (default: this one).")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="K=V", help="Environment of the agent; repeatable.")] = None,
    mount: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Host directory shown read-only where it is; repeatable.")
    ] = None,
    on_divergence: Annotated[
        OnDivergence, typer.Option(help="What happens when a restored agent takes another path than the log's.")
    ] = OnDivergence.CONTINUE,
    budget: Annotated[
        str | None, typer.Option(metavar="DOLLARS", help="What its model calls may cost; beyond it the session waits.")
    ] = None,
    checkpoint_share: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="What checkpoints at turns may cost of the wall time: 5%, or `always`."),
    ] = None,
    restart: Annotated[
        str, typer.Option(metavar="POLICY", help="`on-failure:N`: begin an agent that fails again, N times in a row.")
    ] = "no",
    on_lost: Annotated[
        OnLost, typer.Option(help="What happens when none of its saved memories can be restored.")
    ] = OnLost.BOOT,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Park the session when its sandbox comes near it: 512M, 2G.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Copy a workspace of any size without asking.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the session's id as JSON (with --detach).")] = False,
) -> None:
    """Run a command as a durable session.

    The agent runs in a sandbox of its own, on a copy of the workspace. Every model call it makes (OPENAI_BASE_URL and
    ANTHROPIC_BASE_URL point to Torpor inside) is logged and checkpointed. Its output is this command's output, its exit
    status is this command's.
    """
    request = Request(
        argv=tuple(command),
        name=name,
        image=image,
        workspace=workspace or Path.cwd(),
        environment=env_pairs(env or []),
        mounts=tuple(mount or ()),
        on_divergence=on_divergence,
        budget_nanousd=None if budget is None else parse_dollars(budget),
        checkpoint_share_ppm=None if checkpoint_share is None else parse_share(checkpoint_share),
        on_lost=on_lost,
        memory_bytes_max=None if memory is None else parse_memory(memory),
        restarts_max=parse_restart(restart),
        any_size=yes,
    )

    async def work() -> Outcome | None:
        async with open_node() as node:
            # First who is to run it: a session that nobody can run would only keep its name.
            await (_ensure_daemon(node) if detach else node.runtime.runsc())
            session_id = await _create(node, request)
            if detach:
                await _detach(node, session_id, name, as_json=json)
                return None
            err.print(f"session {session_id}", markup=False)
            return await node.run(session_id, TerminalWatcher())

    _exit_with(asyncio.run(work()))


def resume(
    session: Annotated[str, typer.Argument(metavar="SESSION", help="Id, unique beginning of an id, or name.")],
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Go on in the background.")] = False,
    let_go: Annotated[
        bool, typer.Option("--continue", help="Let the agent take another path than the log's; a living node is asked.")
    ] = False,
    boot: Annotated[
        bool, typer.Option("--boot", help="Give up the agent's memory: start it anew, with its files and its log.")
    ] = False,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What its sandbox may take from now on: 512M, 2G.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the session's id as JSON (with --detach).")] = False,
) -> None:
    """Go on with a session whose node or sandbox died, or that was stopped.

    The living sandbox is adopted if there is one, else the newest checkpoint that restores is taken. Answers that were
    already paid for come from the log.
    """

    async def work() -> Outcome | None:
        async with open_node() as node:
            found = await node.runtime.session(session)
            if let_go and await node.ask(found.session_id, "continue") is not None:
                return None
            if memory is not None:
                async with node.runtime.borrow(found.session_id, node.holder, wire.answers) as records:
                    await records.limit_memory(parse_memory(memory))
            if detach:
                await _detach(node, found.session_id, found.name, as_json=json, let_go=let_go, boot=boot)
                return None
            err.print(f"session {found.session_id}", markup=False)
            return await node.run(found.session_id, TerminalWatcher(), let_go=let_go, boot=boot)

    _exit_with(asyncio.run(work()))


async def _create(node: Node, request: Request) -> SessionId:
    """Make the session; a person at a terminal is asked about a workspace that is larger than is usual."""
    try:
        return await node.create(request)
    except InvalidInput as error:
        if error.code != "workspace_needs_consent" or not sys.stdin.isatty():
            raise
        if not typer.confirm(f"{error}. Copy it?", err=True):
            raise
    return await node.create(replace(request, any_size=True))


def env_pairs(texts: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not key or not separator:
            raise InvalidInput("env_malformed", f"cannot read --env {text!r}: it is not K=V")
        pairs[key] = value
    return pairs


async def _ensure_daemon(node: Node) -> dict[str, Any]:
    from torpor.cli.daemon import ensure

    return await ensure(node, while_needed=True)


async def _detach(
    node: Node, session_id: SessionId, name: str | None, *, as_json: bool, let_go: bool = False, boot: bool = False
) -> None:
    """Leave a session to the node daemon, which is started if need be; returns once the session lives or has failed."""
    told = await _ensure_daemon(node)

    async def due(records: Records) -> dict[str, Any]:
        await records.make_due()
        return {}

    # One that sleeps in the daemon's care is woken; any other becomes due.
    await node.ask_or_own(session_id, "wake", due)
    if session_id not in [one["session"] for one in told["sessions"]]:
        await node.ask_daemon("start", session=session_id, let_go=let_go, boot=boot)
    if told["upstreams"] != upstreams_digest(node.runtime):
        notice("the node daemon calls other providers, or with other keys, than this shell says: torpor up --replace")
    notice(f"runs in the background: `torpor log -f {name or session_id}`, `torpor output {name or session_id}`")
    if as_json:
        print_json({"session": session_id})
    else:
        typer.echo(session_id)


def _exit_with(outcome: Outcome | None) -> None:
    if outcome is None:
        return
    if outcome.status is SessionStatus.CANCELLED:
        notice("the session was killed by another command")
        raise typer.Exit(EXIT_KILLED)
    if outcome.status is SessionStatus.ASLEEP:
        notice("the session was stopped, and is asleep at its newest checkpoint; `torpor resume` goes on with it")
        raise typer.Exit(EXIT_STOPPED)
    if outcome.status is SessionStatus.FAILED and outcome.exit_status is None:
        raise Conflict(
            "session_diverged",
            "cannot go on with this session: after its restore the agent took another path than the log's",
            hint="`torpor log` shows where; `torpor pull` brings the files of the newest checkpoint.",
        )
    raise typer.Exit(outcome.exit_status or 0)
