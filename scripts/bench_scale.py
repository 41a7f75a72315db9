"""`make bench-scale`: what looks at a large store, timed: one session of 1,000 checkpoints among 10,000 snapshots.

A real Python agent runs in runsc for as many steps as the long session has checkpoints. The long session saves each of
its images; beside it nine other sessions at a time save each, and after a hundred steps nine others take their place,
as sessions of the same image and command do. Rows, log and snapshots are made by the code that always makes them,
without a node. Then the commands run as a user runs them.

With --home the store is left there, and used again if it is there: measuring needs no second generation.
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
import threading
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from bench_images import agent_images
from rich.console import Console
from rich.progress import track
from rich.table import Table

from torpor.config import torpor_home
from torpor.core.clock import SystemClock
from torpor.core.ids import new_node_id, new_snapshot_id
from torpor.db import checkpoints
from torpor.runtime.home import Home
from torpor.runtime.runtime import Runtime, node_holder, open_runtime
from torpor.sandbox.tools import find_runsc
from torpor.snapshots.backend import LocalDirectory
from torpor.snapshots.capture import capture
from torpor.snapshots.cipher import new_key
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.manifest import PagedFile, SnapshotRef, decode_extents
from torpor.snapshots.store import SnapshotStore
from torpor.testing.generated import GeneratedSession, generate_session

CLOCK = SystemClock()
console = Console(highlight=False)
STEP_NS = 180 * 10**9
BEGIN_NS = 1_700_000_000 * 10**9
KEEP_ALL = "[retention]\nkeep_last = 1000000\n"
HEAP_MB, TURNS_KEPT, CHANGES = 10, 20, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=1000, help="of the long session")
    parser.add_argument("--others", type=int, default=90, help="sessions with a tenth as many; a multiple of ten")
    parser.add_argument("--rounds", type=int, default=9, help="restores of each checkpoint")
    parser.add_argument("--home", type=Path, help="where the store is made, or is (default: a temporary directory)")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a tmpfs for images")
    arguments = parser.parse_args()
    home = arguments.home or Path(tempfile.mkdtemp(prefix="bench-scale-"))
    memory = Path(tempfile.mkdtemp(prefix="bench-scale-", dir=arguments.memory))
    try:
        console.print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")
        if not (home / "made.json").exists():
            asyncio.run(Generation(home, memory, arguments.checkpoints, arguments.others).run())
        console.print_json((home / "made.json").read_text())
        commands = Commands(home)
        asyncio.run(measure_restores(home, memory, arguments.rounds))
        commands.look()
        commands.collect_all_kept()
        console.print("the newest images lie side by side now:")
        asyncio.run(measure_restores(home, memory, arguments.rounds))
        commands.collect_as_configured()
        console.print(commands.table)
        console.print(f"load {os.getloadavg()[0]:.1f}")
    finally:
        shutil.rmtree(memory)
        if arguments.home is None:
            shutil.rmtree(home)


class Generation:
    """Makes the home: `made.json` is there when it is whole."""

    def __init__(self, home: Path, memory: Path, steps: int, others: int) -> None:
        self._home = home
        self._memory = memory
        self._steps = steps
        self._others = others

    async def run(self) -> None:
        environment = {**os.environ, "TORPOR_HOME": str(self._home)}
        runsc = find_runsc(Home(torpor_home(os.environ)).tools, os.environ, CLOCK).path
        started = time.monotonic()
        async with open_runtime(environment, CLOCK) as runtime, AsyncExitStack() as open_now:
            self._me = node_holder(runtime.home, new_node_id(BEGIN_NS))
            sessions = [await self._session(runtime, number) for number in range(self._others + 1)]
            for session in sessions:
                open_now.push_async_callback(session.close)
            scratch = self._memory / "agent"
            with agent_images(runsc, scratch, HEAP_MB, self._steps, turns_kept=TURNS_KEPT, changes=CHANGES) as images:
                steps = enumerate(images, 1)
                for step, (image, workspace) in track(steps, "making checkpoints", total=self._steps, console=console):
                    await self._save(sessions, step, image, workspace)
                    shutil.rmtree(image)
                    if step == self._steps:
                        break
        made = sum(path.is_file() for path in (self._home / "store/manifests").glob("*/*"))
        stored = sum(path.stat().st_size for path in (self._home / "store").glob("*/*/*"))
        facts = {"snapshots": made, "stored_mb": stored // 10**6, "seconds": round(time.monotonic() - started)}
        (self._home / "made.json").write_text(json.dumps(facts))

    async def _session(self, runtime: Runtime, number: int) -> GeneratedSession:
        name = "long" if number == 0 else f"other{number}"
        return await generate_session(runtime, self._me, self._memory / name, name=name)

    async def _save(self, sessions: Sequence[GeneratedSession], step: int, image: Path, workspace: Path) -> None:
        """The long session's turn first, then of those whose turn it is."""
        wall_ns = BEGIN_NS + step * STEP_NS
        await sessions[0].checkpoint(wall_ns=wall_ns, image=image, workspace=workspace)
        first = 1 + (step - 1) * 10 // self._steps * self._others // 10
        async with asyncio.TaskGroup() as saving:
            for session in sessions[first : first + self._others // 10]:
                saving.create_task(session.checkpoint(wall_ns=wall_ns, image=image, workspace=workspace))


class CountingDirectory(LocalDirectory):
    """A local store that counts what is read of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = root
        self._counting = threading.Lock()
        self.forget()

    def forget(self) -> None:
        self.keys: set[str] = set()
        self.reads = self.bytes_read = 0

    def get(self, key: str) -> bytes:
        return self._counted(key, super().get(key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._counted(key, super().get_range(key, start, length))

    def _counted(self, key: str, data: bytes) -> bytes:
        with self._counting:
            self.keys.add(key)
            self.reads += 1
            self.bytes_read += len(data)
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One snapshot to be restored, again and again."""

    name: str
    store: SnapshotStore
    backend: CountingDirectory
    ref: SnapshotRef


async def measure_restores(home: Path, memory: Path, rounds: int) -> None:
    """Rebuild images of early and late checkpoints, in turns; and the same images from a store that has no past."""
    async with open_runtime({**os.environ, "TORPOR_HOME": str(home)}, CLOCK) as runtime:
        session = await runtime.session("long")
        points = await runtime.database.read(lambda tx: checkpoints.list_intact(tx, session.session_id))
        ids = ContentIds((await runtime.stores.keyring()).tenant.secret)
        refs = await runtime.stores.of(session)
        backend = CountingDirectory(home / "store")
        store = SnapshotStore(backend, ids)
        last = points[-1].number
        subjects = [
            Subject(name=f"checkpoint {point.number}", store=store, backend=backend, ref=refs.ref(point))
            for point in points
            if point.number in (1, 2, last // 10, last // 2, last - 1, last)
        ]
        anew = [saved_anew(subject, ids, memory) for subject in (subjects[0], subjects[-1])]
        await asyncio.to_thread(show_restores, [*subjects, *anew], memory, rounds)


def saved_anew(subject: Subject, ids: ContentIds, memory: Path) -> Subject:
    """The same image as the first snapshot of an empty store on the same disk."""
    name = f"the image of {subject.name} alone"
    image, empty, staging = memory / "image", memory / "empty", memory / "staging"
    for directory in (empty, staging):
        directory.mkdir()
    subject.store.restore_image(subject.ref, image)
    backend = CountingDirectory(Path(tempfile.mkdtemp(prefix="alone-", dir=subject.backend.root.parent)) / "store")
    store = SnapshotStore(backend, ids)
    with backend.leases.hold() as lease:
        saved = store.save(
            image_dir=image,
            workspace=capture(empty, staging),
            parent=None,
            pins={},
            snapshot_id=new_snapshot_id(BEGIN_NS),
            key=new_key(),
            lease=lease,
        )
    for path in (image, empty, staging):
        shutil.rmtree(path)
    return Subject(name=name, store=store, backend=backend, ref=saved.ref)


def show_restores(subjects: Sequence[Subject], memory: Path, rounds: int) -> None:
    seconds: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    counted: dict[str, tuple[int, int, int]] = {}
    target = memory / "restored"
    for _ in track(range(rounds + 1), "restoring", console=console):
        for subject in subjects:
            subject.backend.forget()
            started = time.perf_counter()
            subject.store.restore_image(subject.ref, target)
            seconds[subject.name].append(time.perf_counter() - started)
            found = subject.backend
            counted[subject.name] = len(found.keys), found.reads, found.bytes_read
            shutil.rmtree(target)
    columns = ("image of", "MB", "extents", "objects", "reads", "MB read", "ms", "ms a MB")
    table = Table(*columns, title=f"rebuilding an image from packs, median of {rounds}, in turns")
    for subject in subjects:
        manifest = subject.store.read_manifest(subject.ref)
        paged = [file for file in manifest.files if isinstance(file, PagedFile)]
        megabytes = sum(file.size for file in manifest.files) / 1e6
        objects, reads, bytes_read = counted[subject.name]
        milliseconds = statistics.median(seconds[subject.name][1:]) * 1000  # The first round fills the page cache.
        extents = sum(len(decode_extents(file.extents)) for file in paged)
        cells = (f"{megabytes:.1f}", extents, objects, reads, f"{bytes_read / 1e6:.1f}", f"{milliseconds:.0f}")
        table.add_row(subject.name, *map(str, cells), f"{milliseconds / megabytes:.2f}")
    console.print(table)


class Commands:
    """Each command as its user sees it: a process, from its start to its end."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.table = Table("command", "s", "processor s", "peak MB", "said", title="commands")

    def look(self) -> None:
        """What changes nothing."""
        self._configure(KEEP_ALL)
        self._run("--version", note="what any command takes")
        self._run("ls", says=False)
        self._run("show", "long", note="a session of 1,000 checkpoints", says=False)
        self._run("checkpoints", "long", "--json", says=False)
        self._run("collect", "--dry-run", note="everything is kept")
        self._run("verify")
        self._run("verify", "--read-data", "other1", note="a session of 100 checkpoints")

    def collect_all_kept(self) -> None:
        self._run("collect", "--grace", "0", "--no-repack", note="everything is kept")
        self._run("collect", "--grace", "0", note="everything is kept; repacks")

    def collect_as_configured(self) -> None:
        """By the default retention: most of the long session's checkpoints go."""
        self._configure("")
        self._run("collect", "--dry-run", "--grace", "0", note="the default retention")
        self._run("collect", "--grace", "0", note="the default retention; repacks")
        self._run("verify", note="after it")

    def _configure(self, text: str) -> None:
        (self._home / "config.toml").write_text(text)

    def _run(self, *command: str, note: str = "", says: bool = True) -> None:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "torpor", *command],
            env={**os.environ, "TORPOR_HOME": str(self._home)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        took = time.perf_counter() - started
        if process.returncode:
            raise RuntimeError(f"{command} exited with {process.returncode}: {said[-300:]}")
        name = " ".join(command) + (f" ({note})" if note else "")
        cells = (f"{took:.1f}", f"{used.ru_utime + used.ru_stime:.1f}", str(used.ru_maxrss // 1024))
        self.table.add_row(name, *cells, said.strip() if says else "")
        console.print(name, *cells, said.strip() if says else "")


if __name__ == "__main__":
    main()
