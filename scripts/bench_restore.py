"""Measure how long an image takes to be there for a restore: from the store, from memory, and plainly copied.

    python scripts/bench_restore.py --rounds 7

First the store alone: an image of a Python agent in runsc is saved after a few steps, so that its pages lie in several
packs, and rebuilt into memory; beside it `cp` of the same file into memory. Then whole sessions: `torpor stop` and
`torpor resume`, with the image still in memory and without; what is told is the time from the request for a life to its
being alive. Medians, and the best of each; the load stands beside them.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench_images import agent_images  # noqa: E402
from tests.stage import stage  # noqa: E402

from torpor.config import torpor_home  # noqa: E402
from torpor.core.clock import SystemClock  # noqa: E402
from torpor.core.ids import new_snapshot_id  # noqa: E402
from torpor.runtime.image_cache import MEMORY_DIRECTORY, NOTHING, staging_directory, trim  # noqa: E402
from torpor.sandbox.tools import find_runsc  # noqa: E402
from torpor.snapshots.backend import LocalDirectory  # noqa: E402
from torpor.snapshots.capture import capture  # noqa: E402
from torpor.snapshots.cipher import new_key  # noqa: E402
from torpor.snapshots.content_ids import ContentIds  # noqa: E402
from torpor.snapshots.store import SavedSnapshot, SnapshotStore  # noqa: E402

CLOCK = SystemClock()
KEY = new_key()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heap-mb", type=int, default=400, help="of the agent in the first part; 400 gives 250 MB")
    parser.add_argument("--session-heap-mb", type=int, default=220, help="of the session's agent; 220 gives 250 MB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="saves before the one that is rebuilt")
    arguments = parser.parse_args()
    runsc = find_runsc(torpor_home(os.environ) / "bin", os.environ, CLOCK).path
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    measure_store(arguments, runsc)
    measure_sessions(arguments, runsc)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


def measure_store(arguments: argparse.Namespace, runsc: Path) -> None:
    with scratch() as disk, scratch(MEMORY_DIRECTORY) as memory:
        store, last = SnapshotStore(LocalDirectory(disk / "store"), ContentIds(KEY.secret)), None
        original = memory / "original"
        with agent_images(runsc, memory / "agent", arguments.heap_mb, arguments.steps) as images:
            for image, workspace in images:
                last = save(store, image, workspace, last, disk)
                shutil.rmtree(original, ignore_errors=True)
                shutil.move(image, original)
        assert last is not None
        saved, target = last, memory / "target"
        size = (original / "pages.img").stat().st_size / 1e6
        packs = len(store.read_manifest(saved.ref).page_packs)
        print(f"image of {size:.0f} MB, its pages in {packs} packs")
        rebuilt, copied = list[float](), list[float]()
        for _ in range(arguments.rounds):
            rebuilt.append(timed(lambda: store.restore_image(saved.ref, target)))
            for path in original.iterdir():
                if path.read_bytes() != (target / path.name).read_bytes():
                    raise RuntimeError(f"{path.name} differs after a restore")
            shutil.rmtree(target)
            copied.append(timed(lambda: subprocess.run(["cp", "-r", original, target], check=True)))
            shutil.rmtree(target)
        show("rebuilt from packs", rebuilt)
        show("cp into memory", copied)


def save(store: SnapshotStore, image: Path, workspace: Path, parent: SavedSnapshot | None, disk: Path) -> SavedSnapshot:
    aside = Path(tempfile.mkdtemp(dir=disk))
    with store.lease() as lease:
        return store.save(
            image_dir=image,
            workspace=capture(workspace, aside, parent and parent.tree),
            parent=parent and parent.ref,
            pins={},
            snapshot_id=new_snapshot_id(CLOCK.wall_ns()),
            key=KEY,
            lease=lease,
        )


def measure_sessions(arguments: argparse.Namespace, runsc: Path) -> None:
    """Stop and resume in turns: once the image is in memory, once it is not."""
    with scratch() as directory, stage(directory / "s", runsc, ["--script", "plain"]) as made:
        shutil.copy(ROOT / "scripts/bench_agent.py", made.project / "agent.py")
        agent = (sys.executable, "agent.py", str(arguments.session_heap_mb), "100000")
        node = made.node("run", "--name", "bench", "--", *agent)
        log = made.follow("bench")
        log.wait("checkpoint.committed", 4)
        took: dict[bool, list[float]] = {True: [], False: []}
        for number in range(2 * arguments.rounds):
            made.torpor("stop", "bench")
            node.wait()
            in_memory = number % 2 == 0
            if not in_memory:
                trim(staging_directory(made.home), NOTHING, CLOCK.wall_ns())
            tier = made.rows("ls")[0]["tier"]
            if tier != ("memory" if in_memory else "store"):
                raise RuntimeError(f"the image is in the tier {tier}")
            lives = log.count("recovery.chosen")
            node = made.node("resume", "bench")
            chosen = log.wait("recovery.chosen", lives + 1)["data"]
            if chosen["mode"] != "restore":
                raise RuntimeError(f"the session was not restored: {chosen}")
            took[in_memory].append(chosen["took_ns"] / 1e9)
            log.wait("checkpoint.committed", log.count("checkpoint.committed") + 2)
        size = made.rows("checkpoints", "bench")[-1]["raw_bytes"] / 1e6
        made.torpor("kill", "bench")
        log.close()
        print(f"session with an image of {size:.0f} MB, from resume to alive")
        show("image in memory", took[True])
        show("image in the store", took[False])


@contextmanager
def scratch(parent: Path | None = None) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="bench-restore-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def show(what: str, seconds: list[float]) -> None:
    print(f"{what:>20}  median {statistics.median(seconds):.3f} s, best {min(seconds):.3f} s", flush=True)


if __name__ == "__main__":
    main()
