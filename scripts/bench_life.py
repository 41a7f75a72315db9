"""`make bench-life`: how long a sleeping session takes to wake, from each tier, and what its sleep saves and costs.

A Python agent with a heap asks one question after the other; each says when it was asked. So the time from the
resolving call to the agent's next instruction is the time that the next question names, less that of the call: both
clocks are the machine's. For each tier the session is put to sleep by hand, and answered when it is there. Beside it,
in the same rounds, the raw `runsc restore` of an image of it into a container that was created before.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import raw_restore  # noqa: E402
from tests.stage import Stage, stage  # noqa: E402

from torpor import wire  # noqa: E402
from torpor.config import torpor_home  # noqa: E402
from torpor.core.clock import SystemClock  # noqa: E402
from torpor.core.errors import Conflict  # noqa: E402
from torpor.db import questions, waitpoints  # noqa: E402
from torpor.db.database import Transaction  # noqa: E402
from torpor.runtime.home import Home  # noqa: E402
from torpor.runtime.image_cache import staging_directory  # noqa: E402
from torpor.runtime.leasing import read_holder  # noqa: E402
from torpor.runtime.reader import open_reader  # noqa: E402
from torpor.sandbox.process import cpu_seconds_below  # noqa: E402
from torpor.sandbox.tools import find_runsc  # noqa: E402

CLOCK = SystemClock()
console = Console(highlight=False)
AGENT = """
import json, os, sys, time, urllib.request
heap = [bytes([i % 251]) * 4096 for i in range(int(sys.argv[1]) * 256)]
asked = 0
while True:
    body = json.dumps({"question": json.dumps([asked, time.time_ns()])}).encode()
    with urllib.request.urlopen("http://127.0.0.1:4100/torpor/v1/ask", body) as answer:
        json.load(answer)
    asked += 1
"""
LONG = 100_000
SETTLED_CYCLES = 10
TIERS = {
    "paused": (LONG, LONG, 10**9),
    "ready": (0, LONG, 10**9),
    "memory": (0, 0, 10**9),
    "store": (0, 0, 0),
}
"""Seconds in the pause, seconds with an empty sandbox ready, bytes of the image cache: what makes a tier the last."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heap-mb", type=int, default=45, help="of the agent; 45 gives an image of about 65 MB")
    parser.add_argument("--rounds", type=int, default=30, help="wakes in each tier")
    parser.add_argument("--cycles", type=int, default=0, help="instead: so many sleeps and wakes, and what they leak")
    parser.add_argument("--tiers", default=",".join(TIERS))
    arguments = parser.parse_args()
    runsc = find_runsc(Home(torpor_home(os.environ)).tools, os.environ, CLOCK)
    console.print(f"runsc {runsc.version}, load {os.getloadavg()[0]:.1f}")
    rows = []
    for tier in arguments.tiers.split(","):
        scratch = Path(tempfile.mkdtemp(prefix="torpor-bench-"))
        try:
            with stage(scratch, runsc.path) as made:
                if arguments.cycles:
                    show_leaks(Life(made, tier, arguments.heap_mb), arguments.cycles)
                else:
                    rows.append(measure(Life(made, tier, arguments.heap_mb), runsc, arguments.rounds))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if rows:
        show(rows)


class Life:
    """One session in the care of a daemon that lets it sleep in one tier."""

    def __init__(self, made: Stage, tier: str, heap_mb: int) -> None:
        self.made = made
        self.tier = tier
        paused, ready, cache = TIERS[tier]
        made.home.mkdir(parents=True)
        (made.home / "config.toml").write_text(
            f"image_cache_bytes_max = {cache}\n"
            f'[hibernate]\nlinger_seconds = "never"\npaused_seconds = {paused}\nready_seconds = {ready}\n'
        )
        (made.project / "asker.py").write_text(AGENT)
        made.torpor("up")
        started = made.torpor("run", "-d", "--name", "bench", "--", sys.executable, "asker.py", str(heap_mb))
        self.session = started.stdout.strip()
        self.home = Home(made.home)
        daemon = read_holder(self.home.daemon_lock)
        assert daemon is not None
        self.daemon = daemon

    async def ask(self, verb: str, **arguments: object) -> dict[str, Any]:
        return await wire.ask(self.daemon.socket, verb, deadline_seconds=300, **arguments)

    async def state(self) -> str:
        told = await self.ask("status")
        return next((one["state"] for one in told["sessions"] if one["session"] == self.session), "stored")

    async def until(self, *states: str) -> None:
        while await self.state() not in states:  # noqa: ASYNC110 - the daemon tells nobody
            await asyncio.sleep(0.005)

    def question(self, after: int) -> tuple[str, int, int]:
        """The open waitpoint, with the number and the time of its question, once it is one after that number."""
        return asyncio.run(self._question(after))

    async def _question(self, after: int) -> tuple[str, int, int]:
        def asked(tx: Transaction) -> list[tuple[str, str]]:
            return [(point.waitpoint_id, questions.question_of(tx, point).text) for point in waitpoints.list_open(tx)]

        async with open_reader(self.made.environment, CLOCK) as reader:
            while True:
                for waitpoint, text in await reader.database.read(asked):
                    number, asked_ns = json.loads(text)
                    if number > after:
                        return waitpoint, number, asked_ns
                await asyncio.sleep(0.01)

    async def sleep(self) -> float:
        """Put it to sleep, and wait until it is in the tier; processor seconds that the node used for it."""
        before = processor_seconds(self.daemon.pid)
        while True:
            try:
                await self.ask("hibernate", session=self.session)
                break
            except Conflict as refused:  # On a busy machine the agent may not yet do nothing but wait.
                if refused.code != "session_busy":
                    raise
                await asyncio.sleep(0.1)
        await self.until("paused" if self.tier == "paused" else "ready" if self.tier == "ready" else "stored")
        return processor_seconds(self.daemon.pid) - before

    async def resolve(self, waitpoint: str) -> int:
        """Answer as `torpor resolve` does, without the start of a Python; gives when the call was made."""
        at_ns = time.time_ns()
        if self.tier in ("paused", "ready"):
            await self.ask("resolve", session=self.session, waitpoint=waitpoint, answer="yes")
        else:
            from torpor.core.ids import SessionId, WaitpointId
            from torpor.node import Node
            from torpor.runtime.runtime import open_runtime

            async with open_runtime(self.made.environment, CLOCK) as runtime:
                node = Node(runtime, CLOCK)
                session_id = SessionId(self.session)
                at_ns = time.time_ns()

                async def act(records: Any) -> dict[str, Any]:
                    await records.resolve(WaitpointId(waitpoint), "yes")
                    return {}

                await node.ask_or_own(session_id, "resolve", act, waitpoint=waitpoint, answer="yes")
        return at_ns


def measure(life: Life, runsc: Any, rounds: int) -> dict[str, Any]:
    """Wakes of one tier, and the raw restores between them."""
    latencies: list[float] = []
    raw: list[float] = []
    cost: list[float] = []
    waitpoint, number, _ = life.question(-1)
    memory = sandbox_memory(life.made)
    kept = life.made.directory / "raw-image"
    for _ in range(rounds):
        cost.append(asyncio.run(life.sleep()))
        if not kept.exists() and (image := staged_image(life)) is not None:
            shutil.copytree(image, Path(tempfile.mkdtemp(prefix="torpor-raw-", dir="/dev/shm")) / "image")
            kept.symlink_to(next(Path("/dev/shm").glob("torpor-raw-*/image")))
        if kept.exists():
            raw.append(raw_restore(life.made, runsc, kept) * 1e3)
        at_ns = asyncio.run(life.resolve(waitpoint))
        waitpoint, number, asked_ns = life.question(number)
        latencies.append((asked_ns - at_ns) / 1e6)
    if kept.exists():
        shutil.rmtree(kept.resolve().parent)
    points = life.made.rows("checkpoints", "bench")
    life.made.torpor("kill", "bench")
    life.made.torpor("down")
    return {
        "tier": life.tier,
        "latencies": latencies,
        "raw": raw,
        "cost": statistics.median(cost),
        "memory": memory,
        "stored": statistics.median(point["stored_bytes"] for point in points[1:]),
        "raw_bytes": points[-1]["raw_bytes"],
    }


def staged_image(life: Life) -> Path | None:
    found = sorted((staging_directory(life.home.root) / life.session).glob("*/complete"))
    return found[-1].parent / "image" if found else None


def processor_seconds(pid: int) -> float:
    """Of a process and of all that it started and that still runs."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + (cpu_seconds_below(pid) or 0.0)


def sandbox_memory(made: Stage) -> float:
    """MB that the sandboxes of a home take, shared pages counted by their share."""
    total = 0
    for pid in [each for one in made.sandbox_pids() for each in family(one)]:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1e3


def family(pid: int) -> list[int]:
    """A process and all that it started: the programs of a sandbox run in children of its kernel."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid, *(each for task in tasks for child in task.read_text().split() for each in family(int(child)))]


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="From the resolving call to the agent's next instruction, ms", title_justify="left")
    columns = ("tier", "wakes", "p50", "p90", "p99", "raw restore p50", "x")
    for column in columns:
        table.add_column(column, justify="left" if column == "tier" else "right")
    for row in rows:
        found = row["latencies"]
        raw = statistics.median(row["raw"]) if row["raw"] else None
        times = f"{statistics.median(found) / raw:.2f}" if raw else "-"
        shares = (f"{quantile(found, share):.0f}" for share in (0.5, 0.9, 0.99))
        table.add_row(row["tier"], str(len(found)), *shares, f"{raw:.0f}" if raw else "-", times)
    console.print(table)
    row = rows[-1]
    console.print(
        f"image {row['raw_bytes'] / 1e6:.0f} MB; the living sandbox, with a warm slot, takes {row['memory']:.0f} MB; "
        f"a sleep of {row['tier']} costs {row['cost']:.2f} s of the node's processor time and stores "
        f"{row['stored'] / 1e6:.2f} MB"
    )
    for seconds in (60, 3600, 86_400):
        lingering = min(seconds, 35) * row["memory"]
        console.print(
            f"a wait of {seconds} s: {seconds * row['memory'] / 1e3:.1f} GB·s left running, {lingering / 1e3:.1f} GB·s "
            "with 5 s of linger and 30 s in the pause"
        )
    console.print(f"load {os.getloadavg()[0]:.1f}")


def show_leaks(life: Life, cycles: int) -> None:
    """Sleep and wake again and again, and count what is there at the beginning and at the end."""
    waitpoint, number, _ = life.question(-1)
    first: dict[str, int] = {}
    latencies: list[float] = []
    for cycle in track(range(cycles), "sleeps and wakes", console=console, disable=not console.is_terminal):
        asyncio.run(life.sleep())
        at_ns = asyncio.run(life.resolve(waitpoint))
        waitpoint, number, asked_ns = life.question(number)
        latencies.append((asked_ns - at_ns) / 1e6)
        if cycle == SETTLED_CYCLES - 1:
            first = count(life)
    last = count(life)
    some = min(50, cycles // 2)
    first["waking, ms (median)"] = round(statistics.median(latencies[:some]))
    last["waking, ms (median)"] = round(statistics.median(latencies[-some:]))
    title = f"What is there after {SETTLED_CYCLES} and after {cycles} cycles ({life.tier})"
    table = Table(title=title, title_justify="left")
    for column in ("what", f"after {SETTLED_CYCLES}", f"after {cycles}"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, value in first.items():
        table.add_row(name, str(value), str(last[name]))
    console.print(table)
    life.made.torpor("kill", "bench")
    life.made.torpor("down")


def count(life: Life) -> dict[str, int]:
    pid = life.daemon.pid
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    session = life.home.session(life.session)  # pyright: ignore[reportArgumentType]
    staged = staging_directory(life.home.root)
    return {
        "file descriptors of the daemon": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads of the daemon": len(list(Path(f"/proc/{pid}/task").iterdir())),
        "memory of the daemon, MB": resident // 1000,
        "mounts": len(Path("/proc/self/mounts").read_text().splitlines()),
        "processes of sandboxes": len(life.made.sandbox_pids()),
        "FIFOs": sum(1 for path in session.rglob("*") if path.is_fifo()),
        "directories of incarnations": len(list((session / "incarnations").iterdir())),
        "files staged in memory": sum(1 for path in staged.rglob("*") if path.is_file()),
        "state files of the driver": len(list(life.home.driver_state.iterdir())),
    }


if __name__ == "__main__":
    main()
