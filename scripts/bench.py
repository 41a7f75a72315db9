"""`make bench`: freeze, restore and bytes per turn of real sessions, beside the raw runsc commands, in one run.

The raw commands run on the very sandboxes that the session uses, between its turns. Figures are medians; the machine's
load at start and end is printed, because a busy machine makes every one of them worse.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tests.stage import Log, Stage, stage  # noqa: E402

from torpor.config import torpor_home  # noqa: E402
from torpor.core.clock import SystemClock  # noqa: E402
from torpor.core.ids import SessionId  # noqa: E402
from torpor.runtime.home import Home  # noqa: E402
from torpor.runtime.spec import SessionSpec, sandbox_plan  # noqa: E402
from torpor.sandbox.gvisor import GvisorDriver, GvisorSandbox, Runsc  # noqa: E402
from torpor.sandbox.tools import find_runsc  # noqa: E402

CLOCK = SystemClock()
console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heap-mb", type=int, nargs="*", default=[0, 230], help="sizes of the agent's heap")
    parser.add_argument("--rounds", type=int, default=5, help="how often each thing is measured")
    parser.add_argument("--random", action="store_true", help="an agent whose heap nothing compresses")
    parser.add_argument("--json", action="store_true", help="print one object a size")
    options = parser.parse_args()
    runsc = find_runsc(torpor_home(os.environ) / "bin", os.environ, CLOCK)
    if not options.json:
        console.print(f"runsc {runsc.version}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for heap_mb in options.heap_mb:
        figures = measure(runsc, heap_mb, options.rounds, ["random"] if options.random else [])
        if options.json:
            print(json.dumps({"heap_mb": heap_mb, **figures}))
        else:
            show(heap_mb, figures)
    if not options.json:
        console.print(f"load at the end {os.getloadavg()[0]:.1f}")


def measure(runsc: Runsc, heap_mb: int, rounds: int, entries: list[str]) -> dict[str, Any]:
    """One session of one size: undisturbed turns, raw commands between them, then restores of each kind."""
    scratch = Path(tempfile.mkdtemp(prefix="torpor-bench-"))
    try:
        with stage(scratch, runsc.path, ["--script", "plain", "--first-byte-seconds", "1.5"]) as made:
            shutil.copy(ROOT / "scripts/bench_agent.py", made.project / "agent.py")
            run = ("run", "--name", "bench", "--", sys.executable, "agent.py", str(heap_mb), "1000", *entries)
            node = made.node(*run)
            log = made.follow("bench")
            log.wait("checkpoint.committed", 3 + rounds)
            raw = [raw_checkpoint(made, runsc, number) for number in range(rounds)]
            image = made.directory / "raw-0"
            warm = [kill_and_wait(log, kill_living(made, runsc, log)) for _ in range(rounds)]
            created = [raw_restore(made, runsc, image) for _ in range(rounds)]

            def kill_everything() -> None:
                nonlocal node
                node.kill()
                node.wait()
                made.kill_sandbox()
                node = made.node("resume", "bench")

            cold = [kill_and_wait(log, kill_everything) for _ in range(rounds)]
            points = [point for point in made.rows("checkpoints", "bench") if point["reason"] == "call"]
            made.torpor("kill", "bench")
            log.close()
            steady = points[2:]
            return {
                "image_mb": statistics.median(point["raw_bytes"] for point in steady) / 1e6,
                "freeze_ms": statistics.median(point["freeze_ns"] for point in steady) / 1e6,
                "raw_checkpoint_ms": statistics.median(raw) * 1e3,
                "commit_ms": statistics.median(point["commit_ns"] for point in steady) / 1e6,
                "stored_mb_a_turn": statistics.median(point["stored_bytes"] for point in steady) / 1e6,
                "first_stored_mb": points[0]["stored_bytes"] / 1e6,
                "restore_warm_ms": statistics.median(warm),
                "restore_cold_ms": statistics.median(cold),
                "raw_restore_into_created_ms": statistics.median(created) * 1e3,
            }
    finally:
        for kept in scratch.glob("raw-*"):
            shutil.rmtree(kept.resolve(), ignore_errors=True)  # In memory.
        shutil.rmtree(scratch, ignore_errors=True)


def sandbox_of(made: Stage, runsc: Runsc, incarnation: int = 0) -> GvisorSandbox:
    """The session's sandbox as its driver sees it, or a plan for one more beside it."""
    import msgspec

    row = made.events("bench")
    session = SessionId(row[0]["session"])
    spec = msgspec.convert(row[0]["data"]["spec"], SessionSpec)
    number = incarnation or max(event["incarnation"] for event in row)
    home = Home(made.home)
    driver = GvisorDriver(runsc=runsc, state_directory=home.driver_state, clock=CLOCK)
    plan = sandbox_plan(home, session, spec, number)
    return GvisorSandbox(driver=driver, plan=plan)


def raw_checkpoint(made: Stage, runsc: Runsc, number: int) -> float:
    """Seconds of `runsc checkpoint --leave-running` into memory, by its command."""
    target = Path(tempfile.mkdtemp(prefix="torpor-raw-", dir="/dev/shm"))
    sandbox = sandbox_of(made, runsc)
    words = ("checkpoint", f"--image-path={target}", "--compression=none", "--leave-running", sandbox.plan.sandbox_id)
    started = time.monotonic()
    asyncio.run(sandbox._command(*words))
    seconds = time.monotonic() - started
    kept = made.directory / f"raw-{number}"
    if number == 0:
        kept.symlink_to(target)
    else:
        shutil.rmtree(target)
    return seconds


def raw_restore(made: Stage, runsc: Runsc, image: Path) -> float:
    """Seconds of `runsc restore` into a container that was created before."""
    sandbox = sandbox_of(made, runsc, incarnation=9000 + int(time.monotonic()) % 900)
    sandbox.plan.workspace.mkdir(parents=True)

    async def once() -> float:
        await sandbox.driver.create(sandbox.plan)
        bundle = sandbox.plan.directory / "bundle"
        words = (
            "restore",
            f"--image-path={image.resolve()}",
            f"--bundle={bundle}",
            "--detach",
            sandbox.plan.sandbox_id,
        )
        started = time.monotonic()
        await sandbox._command(*words, namespace=True)
        seconds = time.monotonic() - started
        await sandbox.kill()
        return seconds

    try:
        return asyncio.run(once())
    finally:
        shutil.rmtree(sandbox.plan.directory, ignore_errors=True)


def kill_living(made: Stage, runsc: Runsc, log: Log) -> Callable[[], None]:
    """kill -9 of the sandbox that runs, and of nothing else: the warm slot beside it is what is measured."""

    def kill() -> None:
        number = max(event["incarnation"] for event in log.events)
        slot = sandbox_of(made, runsc, incarnation=number + 1)
        if not slot.alive():
            raise SystemExit("bench: there is no warm slot")
        for pid in sandbox_of(made, runsc, incarnation=number).pids() or ():
            os.kill(pid, signal.SIGKILL)

    return kill


def kill_and_wait(log: Log, kill: Callable[[], None]) -> float:
    """Milliseconds from the request for a life to its ALIVE with all streams inherited, as the log has it."""
    log.wait("checkpoint.committed", log.count("checkpoint.committed") + 2)
    before = log.count("recovery.chosen")
    kill()
    return log.wait("recovery.chosen", before + 1)["data"]["took_ns"] / 1e6


def show(heap_mb: int, figures: dict[str, Any]) -> None:
    table = Table(title=f"Python agent with a heap of {heap_mb} MB (image {figures['image_mb']:.0f} MB), medians")
    for column in ("what", "Torpor", "raw runsc", "to reach"):
        table.add_column(column)
    freeze, raw = figures["freeze_ms"], figures["raw_checkpoint_ms"]
    table.add_row("freeze per checkpoint", f"{freeze:.0f} ms", f"{raw:.0f} ms", f"<= {raw + 60:.0f} ms")
    created = figures["raw_restore_into_created_ms"]
    warm, cold = figures["restore_warm_ms"], figures["restore_cold_ms"]
    table.add_row("restore to ALIVE, warm slot", f"{warm:.0f} ms", f"{created:.0f} ms", f"<= {created * 1.3:.0f} ms")
    table.add_row("restore to ALIVE, no slot, new node", f"{cold:.0f} ms", "", "")
    table.add_row("stored per turn", f"{figures['stored_mb_a_turn']:.2f} MB", "", "<= 1.5 MB")
    table.add_row("stored first", f"{figures['first_stored_mb']:.1f} MB", "", "")
    table.add_row("commit, beside the running agent", f"{figures['commit_ms']:.0f} ms", "", "")
    console.print(table)


if __name__ == "__main__":
    main()
