"""`make bench-fork`: ten children of one session in one command, beside copying its raw image and workspace ten times.

Copying is what a fork costs without a store that shares: ten directories that `runsc restore` can take. Both numbers
include nothing of running the children. Figures are medians; the load is printed, since a busy machine makes every one
of them worse.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tests.stage import PATIENCE_SECONDS, Stage, stage  # noqa: E402

from torpor.config import torpor_home  # noqa: E402
from torpor.core.clock import SystemClock  # noqa: E402
from torpor.runtime.runtime import open_runtime  # noqa: E402
from torpor.sandbox.tools import find_runsc  # noqa: E402

CLOCK = SystemClock()
CHILDREN = 10
console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heap-mb", type=int, nargs="*", default=[54, 230], help="sizes of the agent's heap")
    parser.add_argument("--rounds", type=int, default=5, help="how often each thing is measured")
    parser.add_argument("--json", action="store_true", help="print one object a size")
    options = parser.parse_args()
    runsc = find_runsc(torpor_home(os.environ) / "bin", os.environ, CLOCK)
    if not options.json:
        console.print(f"runsc {runsc.version}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for heap_mb in options.heap_mb:
        figures = measure(runsc.path, heap_mb, options.rounds)
        if options.json:
            print(json.dumps({"heap_mb": heap_mb, **figures}))
        else:
            show(heap_mb, figures)
    if not options.json:
        console.print(f"load at the end {os.getloadavg()[0]:.1f}")


def measure(runsc: Path, heap_mb: int, rounds: int) -> dict[str, Any]:
    """One session that waits for its model; its forks, and copies of what `runsc` would need for them."""
    scratch = Path(tempfile.mkdtemp(prefix="torpor-bench-"))
    try:
        with stage(scratch, runsc, ["--script", "plain", "--first-byte-seconds", "3"]) as made:
            shutil.copy(ROOT / "scripts/bench_agent.py", made.project / "agent.py")
            node = made.node("run", "--name", "bench", "--", sys.executable, "agent.py", str(heap_mb), "1000")
            log = made.follow("bench")
            log.wait("checkpoint.committed", 4)
            number = str(made.rows("checkpoints", "bench")[-1]["number"])
            before = stored(made)
            there = [seconds(lambda: fork(made, "--at", number)) for _ in range(rounds)]
            stored_bytes = (stored(made) - before) / (rounds * CHILDREN)
            now = [seconds(lambda: fork(made)) for _ in range(rounds)]
            log.close()
            point = made.rows("checkpoints", "bench")[-1]
            nothing = [seconds(lambda: made.torpor("ls")) for _ in range(rounds)]
            made.torpor("stop", "bench")
            node.wait(PATIENCE_SECONDS)
            raw = asyncio.run(lay_out(made, scratch / "raw"))
            copied = [seconds(lambda: copy(raw, scratch / "copies")) for _ in range(rounds)]
            return {
                "image_mb": point["raw_bytes"] / 1e6,
                "fork_now_s": statistics.median(now),
                "fork_at_checkpoint_s": statistics.median(there),
                "command_that_reads_s": statistics.median(nothing),
                "stored_kb_a_child": stored_bytes / 1e3,
                "copy_s": statistics.median(copied),
                "copied_mb_a_child": sum(file.stat().st_size for file in raw.rglob("*") if file.is_file()) / 1e6,
            }
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def seconds(act: Any) -> float:
    started = time.monotonic()
    act()
    return time.monotonic() - started


def fork(made: Stage, *options: str) -> None:
    made_children = made.rows("fork", "bench", "--count", str(CHILDREN), *options)
    assert len(made_children) == CHILDREN


def stored(made: Stage) -> int:
    return sum(file.stat().st_size for file in (made.home / "store").rglob("*") if file.is_file())


async def lay_out(made: Stage, target: Path) -> Path:
    """The raw image and the workspace of the session's newest checkpoint, as `runsc restore` takes them."""
    async with open_runtime({**made.environment}, CLOCK) as runtime:
        session = await runtime.session("bench")
        store = await runtime.stores.of(session)
        async with store.lease():
            point = await runtime.newest_checkpoint(session.session_id)
            (target / "workspace").mkdir(parents=True)
            await asyncio.to_thread(store.restore_image, point, target / "image")
            await asyncio.to_thread(store.restore_workspace, point, target / "workspace")
    return target


def copy(raw: Path, target: Path) -> None:
    """Ten copies, durable as a fork is."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for number in range(CHILDREN):
        subprocess.run(["cp", "-r", raw, target / str(number)], check=True)
    subprocess.run(["sync", "-f", target], check=True)


def show(heap_mb: int, figures: dict[str, Any]) -> None:
    table = Table(
        title=f"{CHILDREN} children, heap {heap_mb} MB, image {figures['image_mb']:.0f} MB", title_justify="left"
    )
    for column in ("", "time", "stored for each child"):
        table.add_column(column)
    kept = f"{figures['stored_kb_a_child']:.0f} KB"
    table.add_row("torpor fork, of now (with a checkpoint)", f"{figures['fork_now_s']:.2f} s", kept)
    table.add_row("torpor fork --at CHECKPOINT", f"{figures['fork_at_checkpoint_s']:.2f} s", kept)
    table.add_row("of which: a command that only reads", f"{figures['command_that_reads_s']:.2f} s", "")
    table.add_row(
        "cp -r of image and workspace, sync", f"{figures['copy_s']:.2f} s", f"{figures['copied_mb_a_child']:.0f} MB"
    )
    console.print(table)


if __name__ == "__main__":
    main()
