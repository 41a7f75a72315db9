"""`make bench-sleepers`: ten thousand hibernated sessions on this machine, what they cost, and how they wake.

A few real agents sleep, on a timer that is far away; `torpor fork` makes the others of them. Some timers are then set
to come soon: one each second, and as many at once. Measured are the node daemon's memory, the processes that are left,
`torpor ls`, how late each of the timers is noticed, and when the session that it wakes is alive. Whoever was woken runs
on to its end, which shows that it is whole.
"""

import argparse
import json
import os
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench_life import quantile  # noqa: E402
from tests.stage import Stage, stage  # noqa: E402

from torpor.config import torpor_home  # noqa: E402
from torpor.core.clock import SystemClock  # noqa: E402
from torpor.runtime.home import Home  # noqa: E402
from torpor.sandbox.tools import find_runsc  # noqa: E402

CLOCK = SystemClock()
console = Console(highlight=False)
SECOND_NS = 10**9
AGENT = """
import json, urllib.request
body = json.dumps({"seconds": 10_000_000}).encode()
with urllib.request.urlopen("http://127.0.0.1:4100/torpor/v1/sleep", body) as answer:
    print(json.load(answer)["state"])
"""
CONFIG = "[hibernate]\nlinger_seconds = 0.5\npaused_seconds = 0\nready_seconds = 0\n"
AT_A_TIME = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sleepers", type=int, default=10_000)
    parser.add_argument("--real", type=int, default=4, help="of them run before they sleep")
    parser.add_argument("--timers", type=int, default=100, help="come one a second")
    parser.add_argument("--at-once", type=int, default=100, help="come at one time")
    options = parser.parse_args()
    runsc = find_runsc(Home(torpor_home(os.environ)).tools, os.environ, CLOCK)
    console.print(f"runsc {runsc.version}, load {os.getloadavg()[0]:.1f}")
    scratch = Path(tempfile.mkdtemp(prefix="torpor-bench-"))
    try:
        with stage(scratch, runsc.path) as made:
            make_sleepers(made, options)
            measure(made, options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def make_sleepers(made: Stage, options: argparse.Namespace) -> None:
    made.home.mkdir()
    (made.home / "config.toml").write_text(CONFIG)
    (made.project / "sleeper.py").write_text(AGENT)
    made.torpor("up")
    names = [f"real{number}" for number in range(options.real)]
    for name in names:
        made.torpor("run", "-d", "--name", name, "--", sys.executable, "sleeper.py")
    while any(row["status"] != "asleep" for row in made.rows("ls")):
        time.sleep(0.2)
    left = options.sleepers - len(names)
    started = time.monotonic()
    for number in track(range(0, left, AT_A_TIME), description="forking", console=console):
        parent = names[number // AT_A_TIME % len(names)]
        made.torpor("fork", parent, "--count", str(min(AT_A_TIME, left - number)))
    console.print(f"{left} forks in {time.monotonic() - started:.0f} s")
    made.torpor("down")


def measure(made: Stage, options: argparse.Namespace) -> None:
    with sqlite3.connect(made.home / "torpor.db") as database:
        found = [row[0] for row in database.execute("SELECT session_id FROM session ORDER BY session_id DESC")]
    assert len(found) == options.sleepers
    one_by_one, together = found[: options.timers], found[options.timers : options.timers + options.at_once]
    store = sum(path.stat().st_size for path in (made.home / "store").rglob("*") if path.is_file())
    begin = time.monotonic()
    made.torpor("up")
    console.print(f"up in {time.monotonic() - begin:.1f} s")
    pid = json.loads(made.torpor("status", "--json").stdout)["pid"]
    assert made.sandbox_pids() == []
    listed = [[timed(made, *ls) for _ in range(5)] for ls in (("ls",), ("ls", "--all"), ("ls", "--json"))]
    console.print(
        f"{options.sleepers} sleepers: no sandbox, no process; daemon {memory(pid, 'VmRSS'):.0f} MB; "
        f"torpor ls {statistics.median(listed[0]):.2f} s, all of them {statistics.median(listed[1]):.2f} s, "
        f"as JSON {statistics.median(listed[2]):.2f} s; "
        f"event log {(made.home / 'torpor.db').stat().st_size / 1e6:.0f} MB, snapshots {store / 1e6:.0f} MB"
    )
    rows = []
    for what, sessions, step in (("one a second", one_by_one, SECOND_NS), ("at once", together, 0)):
        due = set_timers(made, sessions, time.time_ns() + 10 * SECOND_NS, step)
        # The daemon looks at the rows every few seconds, whoever wrote them.
        noticed, alive = wait_for_ends(made, due)
        rows.append((what, len(due), noticed, alive))
    show(rows)
    console.print(f"daemon at most {memory(pid, 'VmHWM'):.0f} MB, load {os.getloadavg()[0]:.1f}")
    made.torpor("down")


def set_timers(made: Stage, sessions: Sequence[str], first_ns: int, step_ns: int) -> dict[str, int]:
    due = {session: first_ns + number * step_ns for number, session in enumerate(sessions)}
    with sqlite3.connect(made.home / "torpor.db", timeout=60) as database:
        for session, at in due.items():
            database.execute("UPDATE waitpoint SET due_ns = ? WHERE session_id = ?", (at, session))
            database.execute("UPDATE session SET wake_ns = ? WHERE session_id = ?", (at, session))
    return due


def wait_for_ends(made: Stage, due: dict[str, int]) -> tuple[list[float], list[float]]:
    """When all have ended: milliseconds from each one's time to its waking, and to its life."""
    noticed, alive = dict[str, float](), dict[str, float]()
    marks = ",".join("?" * len(due))
    with sqlite3.connect(made.home / "torpor.db", timeout=60) as database:
        while True:
            ended = f"SELECT count(*) FROM session WHERE status = 'succeeded' AND session_id IN ({marks})"
            if database.execute(ended, list(due)).fetchone()[0] == len(due):
                break
            time.sleep(1)
        events = f"SELECT session_id, kind, data, wall_ns FROM event WHERE session_id IN ({marks}) ORDER BY seq"
        for session, kind, data, wall_ns in database.execute(events, list(due)):
            late = (wall_ns - due[session]) / 1e6
            if kind == "session.status" and json.loads(data)["to"] == "waking" and late >= 0:
                noticed.setdefault(session, late)
            if kind == "recovery.chosen" and late >= 0:
                alive.setdefault(session, late)
    assert noticed.keys() == alive.keys() == due.keys(), "some were lost"
    return list(noticed.values()), list(alive.values())


def timed(made: Stage, *command: str) -> float:
    begin = time.monotonic()
    made.torpor(*command)
    return time.monotonic() - begin


def memory(pid: int, field: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3


def show(rows: Sequence[tuple[str, int, list[float], list[float]]]) -> None:
    table = Table(title="From a timer's time on, ms", title_justify="left")
    for column in ("timers", "", "p50", "p90", "p99", "most"):
        table.add_column(column, justify="left" if column in ("timers", "") else "right")
    for what, count, *measured in rows:
        for name, found in zip(("waking begins", "alive"), measured, strict=True):
            shares = (f"{quantile(found, share):.0f}" for share in (0.5, 0.9, 0.99, 1.0))
            table.add_row(f"{count} {what}", name, *shares)
    console.print(table)


if __name__ == "__main__":
    main()
