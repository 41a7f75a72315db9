"""`torpor up`, `down`, `status`: the node daemon, which runs what nobody attends. And `torpor hibernate`."""

import asyncio
import logging
import os
import re
import sys
from typing import Annotated, Any

import typer

from torpor.cli.lifecycle import JSON, SESSION, ask_running
from torpor.cli.printer import err, human_age, human_bytes, notice, out, print_json, print_rows
from torpor.core.errors import Conflict, SandboxFailed
from torpor.core.session import SessionStatus
from torpor.node import Node, open_node, socket_of
from torpor.runtime.home import Home
from torpor.runtime.leasing import wait_until_free

IDLE_SECONDS = 60.0


def register(app: typer.Typer) -> None:
    app.command("up")(up)
    app.command("down")(down)
    app.command("status")(status)
    app.command("hibernate")(hibernate)


def up(
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Be the daemon, and log to stderr: for systemd and containers.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take over from the daemon that runs; no agent notices.")
    ] = False,
    while_needed: Annotated[
        bool, typer.Option("--while-needed", help="End by itself a minute after the last session that needs a daemon.")
    ] = False,
    systemd_unit: Annotated[
        bool, typer.Option("--systemd-unit", help="Print a unit that runs the daemon, and do nothing else.")
    ] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Start the node daemon of this TORPOR_HOME. It runs sessions in the background, and wakes sleepers.

    It goes on with every session that the last daemon ran: living sandboxes are adopted. It calls the providers that
    its own environment and config.toml say.
    """
    if systemd_unit:
        typer.echo(unit(os.environ.get("TORPOR_HOME")), nl=False)
        return
    if foreground:
        asyncio.run(_be_daemon(replace=replace, while_needed=while_needed))
        return

    async def work() -> tuple[bool, dict[str, Any]]:
        async with open_node() as node:
            if replace:
                await _end(node, leave=True)
            was_there = socket_of(node.runtime.home.daemon_lock) is not None
            return was_there, await ensure(node, while_needed=while_needed)

    was_there, told = asyncio.run(work())
    if json:
        print_json({"pid": told["pid"], "started": not was_there})
    else:
        already = " already" if was_there else ""
        notice(f"the node daemon runs{already}, pid {told['pid']}; torpor status, torpor down")


def down(
    leave_running: Annotated[
        bool, typer.Option("--leave-running", help="Leave the sandboxes as they are: the next `torpor up` adopts them.")
    ] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """End the node daemon. Every session is put to sleep first, and goes on with the next `torpor up`."""

    async def work() -> dict[str, Any] | None:
        async with open_node() as node:
            return await _end(node, leave=leave_running)

    with err.status("waiting for answers that are arriving, and putting sessions to sleep"):
        ended = asyncio.run(work())
    if ended is None:
        notice("no node daemon runs")
    elif not json:
        notice(f"the node daemon, pid {ended['pid']}, has ended")
    if json:
        print_json({"ended": None if ended is None else ended["pid"]})


def status(
    pid: Annotated[bool, typer.Option("--pid", help="Print its process id alone.")] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Show the node daemon: what it runs, what it could not begin and why, and what is due next."""

    async def work() -> tuple[dict[str, Any] | None, int]:
        async with open_node() as node:
            return await node.ask_daemon("status"), node.runtime.clock.wall_ns()

    told, now = asyncio.run(work())
    if told is None:
        raise Conflict("daemon_not_running", "cannot ask the node daemon: none runs", hint="torpor up")
    if pid:
        typer.echo(told["pid"])
        return
    if json:
        print_json(told)
        return
    out.print(f"node daemon {told['version']}, pid {told['pid']}, up for {human_age((now - told['started_ns']) / 1e9)}")
    print_rows(told["sessions"], ("session", "state"), as_json=False, empty="it runs no session")
    for failed in told["failures"]:
        out.print(f"{failed['session']}  failed {failed['times']} times: {failed['reason']}", markup=False)
    if promised := sum(one["memory_promised_bytes"] for one in told["sessions"]):
        out.print(f"{human_bytes(promised)} of memory are promised to sessions that begin")


def hibernate(session: Annotated[str, SESSION], json: Annotated[bool, JSON] = False) -> None:
    """Put a session whose agent only waits to sleep now. It wakes when that comes, if a node is there."""

    async def work() -> str:
        async with open_node() as node:
            found = await node.runtime.session(session)
            if found.status is not SessionStatus.ASLEEP:
                await ask_running(node, found, "hibernate")
            return found.session_id

    slept = asyncio.run(work())
    notice(f"{slept} sleeps")
    if json:
        print_json({"session": slept, "status": SessionStatus.ASLEEP.value})


async def ensure(node: Node, *, while_needed: bool) -> dict[str, Any]:
    """What the node daemon says of itself; it is started if none runs."""
    from torpor.sandbox.process import start_daemon

    told = await node.ask_daemon("status")
    if told is not None:
        return told
    home = node.runtime.home
    command = [sys.executable, "-m", "torpor", "up", "--foreground", *(["--while-needed"] if while_needed else [])]
    started = await asyncio.to_thread(
        start_daemon, command, home.daemon_log, lambda: socket_of(home.daemon_lock) is not None
    )
    told = await node.ask_daemon("status") if started else None
    if told is None:
        reason, hint = _last_words(home)
        raise SandboxFailed("node_not_started", f"cannot start the node daemon: {reason}", hint=hint)
    return told


def _last_words(home: Home) -> tuple[str, str]:
    """Why a daemon ended at once, and the hint that it gave."""
    text = home.daemon_log.read_text(errors="replace").strip()
    said, separator, hint = text.rpartition("\n  hint: ")
    if not separator or "\n" in hint:
        said, hint = text, f"{home.daemon_log} has all that it said."
    reason = said.splitlines()[-1] if said else "it said nothing"
    return re.sub(r"^error \w+: ", "", reason), hint


async def _end(node: Node, *, leave: bool) -> dict[str, Any] | None:
    """End the daemon, and wait until it is gone; None: none runs."""
    ended = await node.ask_daemon("down", leave=leave)
    if ended is not None:
        await wait_until_free(node.runtime.home.daemon_lock)
    return ended


async def _be_daemon(*, replace: bool, while_needed: bool) -> None:
    from torpor.daemon import run_daemon

    logging.getLogger().setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    async with open_node() as node:
        if replace:
            await _end(node, leave=True)
        await run_daemon(node, idle_seconds_max=IDLE_SECONDS if while_needed else None)


def unit(home: str | None) -> str:
    """A systemd unit for the daemon of a TORPOR_HOME.

    Sandboxes are left alone when the daemon is restarted (KillMode), and may have cgroups of their own (Delegate).
    """
    environment = f'Environment="TORPOR_HOME={home}"\n' if home else ""
    return f"""\
[Unit]
Description=Torpor node: durable agent sessions
After=network-online.target
Wants=network-online.target

[Service]
Type=exec
{environment}ExecStart={sys.executable} -m torpor up --foreground
Restart=always
RestartSec=1
KillMode=process
Delegate=yes
TimeoutStopSec=300

[Install]
WantedBy=default.target
"""
