"""`torpor setup` and `torpor doctor`: make this machine ready, and say what it lacks and how to mend it."""

import asyncio
import os
from typing import Annotated

import typer
from rich.console import Console

from torpor.cli.printer import err, out, print_json
from torpor.config import read_store, torpor_home
from torpor.core.clock import SystemClock
from torpor.core.errors import MachineUnfit
from torpor.runtime.home import Home
from torpor.runtime.storage import examine_store
from torpor.sandbox.selftest import Finding, examine, look_around
from torpor.sandbox.tools import fetch_runsc, find_runsc

JSON = typer.Option("--json", help="One finding a line as JSON.")


def register(app: typer.Typer) -> None:
    app.command("setup")(setup)
    app.command("doctor")(doctor)


def setup(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing when all is well.")] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Make this machine ready: find a usable runsc, else fetch one for Torpor alone, then test it for real.

    The test is done once for each runsc and kernel. Nothing of the system is changed.
    """
    clock = SystemClock()
    home = Home(torpor_home(os.environ))
    home.prepare()
    progress = Console(stderr=True, highlight=False)
    try:
        runsc = find_runsc(home.tools, os.environ, clock)
    except MachineUnfit as unfit:
        if os.environ.get("TORPOR_RUNSC"):
            raise
        err.print(f"{unfit}", markup=False)
        runsc = fetch_runsc(home.tools, clock, lambda text: progress.print(text, markup=False))
    passed = home.tools / f"passed-{runsc.sha256[:16]}-{os.uname().release}-{os.geteuid()}"
    if passed.exists() and not json:
        if not quiet:
            out.print(f"ready: runsc {runsc.version} passed its self-test before")
        return
    findings = asyncio.run(examine(home.root, runsc, home.init_directory(), clock))
    _report(findings, as_json=json, quiet=quiet)
    passed.touch()


def doctor(json: Annotated[bool, JSON] = False) -> None:
    """Try the snapshot store; boot a sandbox, checkpoint, kill and restore it, relay a request; explain what fails."""
    clock = SystemClock()
    home = Home(torpor_home(os.environ))
    home.prepare()
    store = examine_store(read_store(home.root, os.environ), clock)
    try:
        runsc = find_runsc(home.tools, os.environ, clock)
    except MachineUnfit as unfit:
        findings = [Finding(check="runsc", ok=False, detail=str(unfit), remedy=unfit.hint), *look_around(clock)]
    else:
        findings = asyncio.run(examine(home.root, runsc, home.init_directory(), clock))
    _report([store, *findings], as_json=json, quiet=False)


def _report(findings: list[Finding], *, as_json: bool, quiet: bool) -> None:
    for finding in findings:
        if as_json:
            print_json({"check": finding.check, "ok": finding.ok, "detail": finding.detail, "remedy": finding.remedy})
        elif not quiet or not finding.ok:
            mark = "[green]ok[/green]  " if finding.ok else "[red]FAIL[/red]"
            out.print(f"{mark} {finding.check}: ", end="")
            out.print(finding.detail, markup=False)
            if finding.remedy:
                out.print(f"     remedy: {finding.remedy}", markup=False)
    failed = [finding for finding in findings if not finding.ok and finding.fatal]
    if failed:
        raise MachineUnfit(
            "machine_unfit", f"cannot run sessions on this machine: {failed[0].check} failed", hint=failed[0].remedy
        )
