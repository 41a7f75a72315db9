"""Measure what a capture of a workspace costs while the agent stands still, beside the system's own tools.

    PYTHONPATH=src python scripts/bench_workspace.py --files 30000

Prints medians in milliseconds, elapsed/processor; on a busy machine only the second means anything. Then how fast big
files are cut and stored, and what is stored again after a small change, beside restic if there is one. `--disk` is
where the workspace and the store are; `--clones DIR` adds a big file on another file system (XFS, Btrfs).
"""

import argparse
import os
import random
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from torpor.core.clock import SystemClock
from torpor.core.ids import SnapshotId
from torpor.snapshots.backend import LocalDirectory
from torpor.snapshots.capture import TreeCapture, capture, watch_tree
from torpor.snapshots.chunks import _pieces
from torpor.snapshots.cipher import new_key
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.manifest import SnapshotRef
from torpor.snapshots.store import SavedSnapshot, SnapshotStore
from torpor.snapshots.tree import TreeIndex
from torpor.snapshots.watch import DirectoryWatch

FILES_PER_DIRECTORY = 10
BIG_BYTES = 50_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--clones", type=Path, help="a directory on a file system that clones")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="bench-workspace-", dir=arguments.disk))
    try:
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors, Linux {os.uname().release}")
        bench = Bench(directory, arguments.files, arguments.rounds)
        bench.small_files()
        bench.big_files()
        if arguments.clones:
            bench.cloned_files(arguments.clones)
    finally:
        shutil.rmtree(directory)


class Bench:
    def __init__(self, directory: Path, files: int, rounds: int) -> None:
        self.directory = directory
        self.workspace = directory / "workspace"
        self.files = files
        self.rounds = rounds
        self.ids, self.key = ContentIds(new_key().secret), new_key()
        self.store = SnapshotStore(LocalDirectory(directory / "store"), self.ids)
        self.refs: dict[SnapshotId, SnapshotRef] = {}
        self.numbers = count()
        (directory / "image").mkdir()

    def small_files(self) -> None:
        directories = make_tree(self.workspace, self.files)
        print(f"\n{self.files} files in {len(directories)} directories")
        self.row("find -printf of every stat", lambda: run("find", self.workspace, "-printf", "%i %s %m %T@ %C@ %n\n"))
        self.row("tar to nowhere", lambda: run("tar", "-cf", "-", "-C", self.workspace, "."))
        self.row("cp -a", lambda: run("cp", "-a", self.workspace, self.fresh() / "copy"), rounds=3)
        self.row("first capture: all is read", self.capture, rounds=3)
        saved = self.save(self.capture())
        index = saved.tree
        self.row("capture, unchanged, all looked at", lambda: self.capture(index))
        watch = DirectoryWatch()
        self.row("watching all directories (before the agent runs)", lambda: watch_tree(self.workspace, index, watch))
        index = watch_tree(self.workspace, index, watch)
        self.row("capture, unchanged, watched", lambda: self.capture(index, watch))
        opened = frozenset([next(directories[5].iterdir()).stat().st_ino])
        self.row("capture, watched, one file open for writing", lambda: self.capture(index, watch, opened))
        for touched in (1, 10, 100, 1000):
            if touched <= len(directories):
                steps = self.writing(watch_tree(self.workspace, index, watch), watch, directories[:touched])
                self.row(f"capture, watched, a file written in {touched} directories", *steps)
                index = self.save(self.capture()).tree
        watch.close()

    def writing(
        self, index: TreeIndex, watch: DirectoryWatch, directories: Sequence[Path]
    ) -> tuple[Callable[[], object], Callable[[], object]]:
        """A capture, and what happens before each: what changed so far is stored, and a file of each is written."""
        newest = [index]

        def write() -> None:
            time.sleep(0.03)  # Until nothing of what was written last counts as fresh.
            newest[0] = self.save(self.capture(newest[0], watch)).tree
            for directory in directories:
                (directory / "file0").write_bytes(os.urandom(2000))

        return lambda: self.capture(newest[0], watch), write

    def big_files(self) -> None:
        body = random.Random(1).randbytes(BIG_BYTES)
        print(f"\na file of {BIG_BYTES // 1_000_000} MB that does not compress")
        path = self.directory / "big"
        path.write_bytes(body)
        descriptor = os.open(path, os.O_RDONLY)
        speed("cut by content", lambda: sum(1 for _ in _pieces(descriptor, BIG_BYTES)))
        speed("the id of it", lambda: self.ids.of_object(body))
        speed("cut, and the ids", lambda: [self.ids.of_object(piece) for _, piece in _pieces(descriptor, BIG_BYTES)])
        os.close(descriptor)
        workspace = self.directory / "big-workspace"
        workspace.mkdir()
        print(f"{'stored again':44} {'Torpor':>12} {'restic':>12}")
        for name, change in CHANGES.items():
            (workspace / "big").write_bytes(body)
            first = self.save(self.capture(workspace=workspace))
            before = Restic(self.fresh()) if shutil.which("restic") else None
            if before:
                before.add(workspace)
            (workspace / "big").write_bytes(change(body))
            second = self.save(self.capture(first.tree, workspace=workspace))
            beside = f"{before.add(workspace) / 1000:.0f} KB" if before else "-"
            print(f"{name:44} {second.stored_bytes / 1000:9.0f} KB {beside:>12}")

    def cloned_files(self, clones: Path) -> None:
        workspace = clones / "bench-workspace"
        workspace.mkdir()
        path = workspace / "big"
        print(f"\na file of 256 MB, changed, on {clones}")
        try:
            for state in ("on the disk", "not yet on the disk"):
                for kind, where in (("cloned", clones / "bench-clones"), ("copied to memory", None)):
                    path.write_bytes(os.urandom(256 << 20))
                    if state == "on the disk":
                        os.sync()
                    staging = Path(tempfile.mkdtemp(prefix="bench-workspace-", dir="/dev/shm"))
                    _, shown = timed(lambda: capture(workspace, staging, clones=where))  # noqa: B023 - called at once
                    print(f"{state + ', ' + kind:60} {shown:>16}")
                    shutil.rmtree(staging)
                    shutil.rmtree(clones / "bench-clones", ignore_errors=True)
        finally:
            shutil.rmtree(workspace)

    def capture(
        self,
        index: TreeIndex | None = None,
        watch: DirectoryWatch | None = None,
        opened: frozenset[int] = frozenset(),
        workspace: Path | None = None,
    ) -> TreeCapture:
        return capture(workspace or self.workspace, self.fresh(), index, watch=watch, always_reread=opened)

    def save(self, captured: TreeCapture) -> SavedSnapshot:
        saved = self.store.save(
            image_dir=self.directory / "image",
            workspace=captured,
            parent=captured.based_on and self.refs[captured.based_on.snapshot_id],
            pins={},
            snapshot_id=SnapshotId(f"snp_{SystemClock().wall_ns()}"),
            key=self.key,
            lease=self.store.lease(),
        )
        self.refs[saved.id] = saved.ref
        return saved

    def fresh(self) -> Path:
        path = self.directory / f"scratch{next(self.numbers)}"
        path.mkdir()
        return path

    def row(
        self,
        name: str,
        work: Callable[[], object],
        before: Callable[[], object] | None = None,
        *,
        rounds: int | None = None,
    ) -> None:
        elapsed, processor = list[float](), list[float]()
        for _ in range(rounds or self.rounds):
            if before:
                before()
            started, used = time.perf_counter(), processor_seconds()
            work()
            elapsed.append(time.perf_counter() - started)
            processor.append(processor_seconds() - used)
        print(
            f"{name:60} {1000 * statistics.median(elapsed):9.2f}/{1000 * statistics.median(processor):.2f}", flush=True
        )


class Restic:
    def __init__(self, directory: Path) -> None:
        self._directory = directory / "repository"
        self._environment = {**os.environ, "RESTIC_PASSWORD": "x", "XDG_CACHE_HOME": str(directory / "cache")}
        self._run("init")

    def add(self, workspace: Path) -> int:
        """Bytes that a backup adds."""
        before = self._stored()
        self._run("backup", str(workspace))
        return self._stored() - before

    def _stored(self) -> int:
        return sum(path.stat().st_size for path in self._directory.rglob("*") if path.is_file())

    def _run(self, *arguments: str) -> None:
        subprocess.run(
            ["restic", "-q", "-r", self._directory, *arguments], env=self._environment, check=True, capture_output=True
        )


def scattered(body: bytes) -> bytes:
    """Twenty pages of it are others."""
    changed, chosen = bytearray(body), random.Random(2)
    for _ in range(20):
        at = chosen.randrange(len(body) // 4096) * 4096
        changed[at : at + 4096] = chosen.randbytes(4096)
    return bytes(changed)


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "one byte put in at the front": lambda body: b"x" + body,
    "100 bytes put in after 20 MB": lambda body: body[:20_000_000] + b"y" * 100 + body[20_000_000:],
    "10 KB appended": lambda body: body + random.Random(3).randbytes(10_000),
    "20 pages of 4 KiB changed here and there": scattered,
}


def make_tree(workspace: Path, files: int) -> list[Path]:
    """Directories as of an installed package: a few files of some hundred bytes to some kilobytes in each."""
    chosen = random.Random(1)
    directories: list[Path] = []
    for number in range(files // FILES_PER_DIRECTORY):
        directory = workspace / f"package{number // 20}" / f"module{number % 20}"
        directory.mkdir(parents=True)
        directories.append(directory)
        for file in range(FILES_PER_DIRECTORY):
            (directory / f"file{file}").write_bytes(chosen.randbytes(chosen.randint(100, 5000)))
    return directories


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def processor_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def timed(work: Callable[[], object]) -> tuple[object, str]:
    started, used = time.perf_counter(), processor_seconds()
    result = work()
    return result, f"{1000 * (time.perf_counter() - started):.0f}/{1000 * (processor_seconds() - used):.0f}"


def speed(name: str, work: Callable[[], object]) -> None:
    times: list[float] = []
    for _ in range(7):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    print(f"{name:44} {BIG_BYTES / 1e6 / statistics.median(times):9.0f} MB for each second of a processor")


if __name__ == "__main__":
    main()
