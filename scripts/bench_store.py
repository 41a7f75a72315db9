"""`make bench-store`: the snapshot store beside raw `runsc`, `zstd -1` of the whole image and `restic`, in one run.

All save the same series of images: of a small and a big Python agent and one for Node, checkpointed by `runsc` after
each of their steps. What is stored per turn, what a save and a rebuild cost, from a directory and from an S3 server on
loopback, what the first snapshot of a second session adds to the first one's, and how long a session takes from the
request to ALIVE. Every rebuilt image is compared byte for byte. Medians; the load stands beside them, and on a busy
machine only bytes and processor time mean anything. Prints the tables of docs/measurements/.
"""

import argparse
import cProfile
import os
import pstats
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402
from bench_images import agent_images  # noqa: E402
from bench_peers import Cost, Restic, Zstd, copy, measured, missing  # noqa: E402
from tests.seaweedfs import seaweedfs  # noqa: E402

from torpor.config import torpor_home  # noqa: E402
from torpor.core.clock import SystemClock  # noqa: E402
from torpor.core.ids import SnapshotId, new_session_id, new_snapshot_id  # noqa: E402
from torpor.runtime.staging import Staging  # noqa: E402
from torpor.sandbox.gvisor import Runsc  # noqa: E402
from torpor.sandbox.tools import find_runsc  # noqa: E402
from torpor.snapshots.backend import Backend, LocalDirectory  # noqa: E402
from torpor.snapshots.capture import capture  # noqa: E402
from torpor.snapshots.cipher import new_key  # noqa: E402
from torpor.snapshots.content_ids import ContentIds  # noqa: E402
from torpor.snapshots.pack_cache import PackCache  # noqa: E402
from torpor.snapshots.shared import SharedIndexes  # noqa: E402
from torpor.snapshots.store import SavedSnapshot, SnapshotStore  # noqa: E402

CLOCK = SystemClock()
KEY = new_key()
IDS = ContentIds(KEY.secret)
SHARES = ("the agent of this benchmark",)


FIRST = "packs on disk, the first image instead of the last"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """One series. `goal_mb` is what a turn may store."""

    name: str
    language: str
    heap_mb: int
    goal_mb: float


AGENTS = {
    "small": Agent(name="Python, small", language="python", heap_mb=22, goal_mb=0.3),
    "big": Agent(name="Python, big", language="python", heap_mb=393, goal_mb=1.1),
    "node": Agent(name="Node", language="node", heap_mb=20, goal_mb=2.0),
}


@dataclass(slots=True)
class Series:
    """What each program paid for the images of one agent."""

    raw_mb: list[float] = field(default_factory=list[float])
    checkpoint: list[Cost] = field(default_factory=list[Cost])
    saves: dict[str, list[Cost]] = field(default_factory=dict[str, list[Cost]])
    rebuilds: dict[str, list[Cost]] = field(default_factory=dict[str, list[Cost]])
    profile: list[str] = field(default_factory=list[str])
    packs: tuple[int, int] = (0, 0)

    def turn_mb(self, program: str) -> float:
        return statistics.median(cost.stored_bytes for cost in self.saves[program][1:]) / 1e6

    def cpu(self, program: str) -> float:
        return statistics.median(cost.cpu_seconds for cost in self.saves[program][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", nargs="*", choices=AGENTS, default=list(AGENTS))
    parser.add_argument("--steps", type=int, default=49, help="so many images after the first (default 49)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each rebuild and restore is measured")
    parser.add_argument("--resume-heap-mb", type=int, default=49, help="of the session's agent; 49 gives 65 MB")
    parser.add_argument("--no-resume", action="store_true", help="leave out the sessions")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="where the stores are")
    options = parser.parse_args()
    if missing():
        sys.exit(f"bench-store: {' and '.join(missing())} missing: apt-get install {' '.join(missing())}")
    runsc = find_runsc(torpor_home(os.environ) / "bin", os.environ, CLOCK)
    print(f"runsc {runsc.version}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    series = {name: run_series(AGENTS[name], runsc.path, options) for name in options.agents}
    show_stored(series)
    show_saves(series)
    show_rebuilds(series)
    if "small" in series:
        show_golden(first_over_golden(AGENTS["small"], runsc.path, options.disk))
    if not options.no_resume:
        show_resume(runsc, options)
    for name, one in series.items():
        print(f"\nWhere the processor time of a save goes ({AGENTS[name].name}):", *one.profile, sep="\n    ")
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


def run_series(agent: Agent, runsc: Path, options: argparse.Namespace) -> Series:
    """Save every image with each program, as the agent makes them; then rebuild the last one."""
    series = Series()
    with scratch(options.disk) as disk, scratch(Path("/dev/shm")) as memory:
        backend = LocalDirectory(disk / "store")
        store, first, last = SnapshotStore(backend, IDS), None, None
        image = memory / "image"
        zstd, restic = Zstd(disk), Restic(disk, image)
        with agent_images(runsc, memory / "agent", agent.heap_mb, options.steps, agent.language) as images:
            for number, (made, workspace) in enumerate(images):
                shutil.rmtree(image, ignore_errors=True)
                shutil.move(made, image)
                series.raw_mb.append(sum(path.stat().st_size for path in image.iterdir()) / 1e6)
                profile = cProfile.Profile() if number == options.steps else None
                last, cost = save(store, image, workspace, last, disk, profile=profile)
                first = first or last
                if profile is None:  # A profile's own time is none of the save's.
                    series.saves.setdefault("Torpor", []).append(cost)
                else:
                    series.profile = top_of(profile)
                series.saves.setdefault(zstd.name, []).append(zstd.save(image))
                series.saves.setdefault(restic.name, []).append(restic.save())
                progress(agent, number, options.steps, series)
        assert first is not None
        assert last is not None
        series.packs = len(store.read_manifest(first.ref).packs), len(store.read_manifest(last.ref).packs)
        rebuild(series, first, last, image, backend, disk, memory, zstd, restic, options.rounds)
    return series


def save(
    store: SnapshotStore,
    image: Path,
    workspace: Path,
    parent: SavedSnapshot | None,
    disk: Path,
    *,
    shares: Sequence[str] = (),
    profile: cProfile.Profile | None = None,
) -> tuple[SavedSnapshot, Cost]:
    """Capture and save; what the session's own node would do after a cut."""
    aside = Path(tempfile.mkdtemp(dir=disk))
    saved: list[SavedSnapshot] = []

    def work() -> int:
        with store.lease() as lease:
            made = store.save(
                image_dir=image,
                workspace=capture(workspace, aside, parent and parent.tree),
                parent=parent and parent.ref,
                pins={},
                snapshot_id=new_snapshot_id(CLOCK.wall_ns()),
                key=KEY,
                lease=lease,
                shares=shares,
            )
        saved.append(made)
        return made.stored_bytes

    if profile is not None:
        profile.enable()
    cost = measured(work)
    if profile is not None:
        profile.disable()
    shutil.rmtree(aside)
    return saved[0], cost


def rebuild(
    series: Series,
    first: SavedSnapshot,
    saved: SavedSnapshot,
    image: Path,
    backend: LocalDirectory,
    disk: Path,
    memory: Path,
    zstd: Zstd,
    restic: Restic,
    rounds: int,
) -> None:
    """The last image, from everywhere it can come from."""
    target = memory / "rebuilt"
    staging = Staging(disk / "home", new_session_id(CLOCK.wall_ns()), memory)
    cached = new_snapshot_id(CLOCK.wall_ns())
    staging.begin(cached, 0)
    shutil.copytree(image, staging.image(cached), dirs_exist_ok=True)
    staging.complete(cached)
    size = sum(path.stat().st_size for path in image.iterdir())

    def note(what: str, cost: Cost, found: Path) -> None:
        check_same(image, found)
        series.rebuilds.setdefault(what, []).append(cost)
        print(f"{what}: {cost.seconds:.3f} s, {cost.cpu_seconds:.3f} s of processor", file=sys.stderr, flush=True)
        shutil.rmtree(target, ignore_errors=True)

    def from_store(where: Backend, snapshot: SavedSnapshot = saved) -> Cost:
        return measured(lambda: SnapshotStore(where, IDS).restore_image(snapshot.ref, target) or 0)

    def from_memory() -> int:
        assert staging.cached(SnapshotId(cached), size) is not None
        return 0

    for _ in range(rounds):
        note("cached raw image", measured(from_memory), staging.image(cached))
        note("packs on disk", from_store(backend), target)
        series.rebuilds.setdefault(FIRST, []).append(from_store(backend, first))
        shutil.rmtree(target)
        note("zstd -d", zstd.restore(target), target)
        note("cp", copy(image, target), target)
        cost = restic.restore(target)
        note("restic restore", cost, target / image.relative_to("/"))
    with seaweedfs(disk / "seaweedfs") as server:
        remote = server.backend("bench/store")
        for key in backend.list(""):
            remote.put(key, backend.get(key))
        for number in range(rounds):
            note("S3 on loopback", from_store(remote), target)
            behind = PackCache(remote, disk / f"cache-{number}", bytes_max=1 << 40)
            note("S3, first with a cache", from_store(behind), target)
            note("S3, cached packs", from_store(behind), target)
        remote.close()


def first_over_golden(agent: Agent, runsc: Path, disk_parent: Path) -> tuple[int, int]:
    """Stored bytes of a session's first snapshot, and of another session's of the same agent after it."""
    stored: list[int] = []
    with scratch(disk_parent) as disk:
        shared = SharedIndexes(disk / "shared", KEY.secret)
        store = SnapshotStore(LocalDirectory(disk / "store"), IDS, shared=shared)
        for number in range(2):
            with (
                scratch(Path("/dev/shm")) as memory,
                agent_images(runsc, memory / "agent", agent.heap_mb, 0, agent.language) as images,
            ):
                image, workspace = next(images)
                saved, _ = save(store, image, workspace, None, disk, shares=SHARES)
                store.share(saved.ref, SHARES, f"session {number}")
                stored.append(saved.stored_bytes)
    return stored[0], stored[1]


def check_same(image: Path, found: Path) -> None:
    for path in image.iterdir():
        if path.read_bytes() != (found / path.name).read_bytes():
            raise RuntimeError(f"{path.name} differs after a restore")


def top_of(profile: cProfile.Profile) -> list[str]:
    """The functions that a save's time was spent in themselves."""
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    rows = sorted(((own, name) for name, (_, _, own, _, _) in stats.items()), reverse=True)[:8]
    total = sum(own for *_, (_, _, own, _, _) in [(0, row) for row in stats.values()])
    return [f"{own / total:4.0%}  {Path(where[0]).name} {where[2]}" for own, where in rows]


def progress(agent: Agent, number: int, steps: int, series: Series) -> None:
    """Each image at once: a run takes long, and what is known when somebody stops it is worth reading."""
    last = {program: costs[-1] for program, costs in series.saves.items()}
    costs = ", ".join(
        f"{name} {cost.stored_bytes / 1e6:.2f} MB {cost.cpu_seconds:.2f} s" for name, cost in last.items()
    )
    print(f"{agent.name}: image {number} of {steps}: {costs}", file=sys.stderr, flush=True)


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="bench-store-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print(f"\n## {title}\n")
    print("|", " | ".join(columns), "|")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("|", " | ".join(str(cell) for cell in row), "|", flush=True)


def show_stored(series: dict[str, Series]) -> None:
    rows = [
        [
            f"{AGENTS[name].name}, {statistics.median(one.raw_mb):.0f} MB",
            f"{one.turn_mb('Torpor'):.2f}",
            f"{AGENTS[name].goal_mb}",
            f"{one.turn_mb('zstd -1'):.1f}",
            f"{one.turn_mb('restic'):.1f}",
            f"{statistics.median(one.raw_mb):.0f}",
            f"{one.saves['Torpor'][0].stored_bytes / 1e6:.1f}",
        ]
        for name, one in series.items()
    ]
    table(
        "Stored per turn, MB",
        ["agent", "Torpor", "goal", "zstd -1", "restic", "raw runsc", "Torpor, first"],
        rows,
    )


def show_saves(series: dict[str, Series]) -> None:
    rows: list[Sequence[object]] = []
    for name, one in series.items():
        for program, costs in one.saves.items():
            elapsed = statistics.median(cost.seconds for cost in costs[1:])
            first = costs[0]
            rows.append(
                [
                    f"{AGENTS[name].name}",
                    program,
                    f"{one.cpu(program):.2f}",
                    f"{elapsed:.2f}",
                    f"{first.cpu_seconds:.2f}",
                    f"{first.seconds:.2f}",
                ]
            )
    columns = ["agent", "program", "processor s", "elapsed s", "first, processor s", "first, elapsed s"]
    table("A save (goal: 0.6 s of processor for the big agent)", columns, rows)


def show_rebuilds(series: dict[str, Series]) -> None:
    rows: list[Sequence[object]] = []
    for name, one in series.items():
        for what, costs in one.rebuilds.items():
            elapsed = [cost.seconds for cost in costs]
            rows.append(
                [
                    AGENTS[name].name,
                    what,
                    f"{statistics.median(elapsed):.3f}",
                    f"{min(elapsed):.3f}",
                    f"{statistics.median(cost.cpu_seconds for cost in costs):.3f}",
                ]
            )
    print()
    for name, one in series.items():
        print(f"{AGENTS[name].name}: the first image needs {one.packs[0]} packs, the last one {one.packs[1]}")
    columns = ["agent", "from", "elapsed s", "best s", "processor s"]
    table("To rebuild an image (goals, big agent: 0.25 s cached, 0.6 s from packs)", columns, rows)


def show_golden(stored: tuple[int, int]) -> None:
    rows = [["first session", f"{stored[0] / 1e6:.1f}", ""], ["second session", f"{stored[1] / 1e6:.1f}", "3"]]
    table("First snapshot of the small agent, MB", ["", "stored", "goal"], rows)


def show_resume(runsc: Runsc, options: argparse.Namespace) -> None:
    figures = bench.measure(runsc, options.resume_heap_mb, options.rounds, [])
    raw = figures["raw_restore_into_created_ms"]
    rows = [
        ["raw runsc restore into a created container", f"{raw:.0f}", ""],
        ["warm slot, image in memory", f"{figures['restore_warm_ms']:.0f}", f"{1.15 * raw:.0f}"],
        ["no slot, image in memory, new node", f"{figures['restore_cold_ms']:.0f}", ""],
    ]
    title = f"From the request for a life to ALIVE, ms, image of {figures['image_mb']:.0f} MB"
    table(title, ["", "ms", "goal"], rows)


if __name__ == "__main__":
    main()
