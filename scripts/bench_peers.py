"""What the store is measured beside: `zstd -1` of the whole image, `restic`, and a plain copy.

Knows the programs, which come with Debian; `missing` says which of them are not here.
"""

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("restic", "zstd")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run: what it wrote that is kept, elapsed time, and processor time of all that took part."""

    stored_bytes: int
    seconds: float
    cpu_seconds: float


def missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program) is None]


def measured(work: Callable[[], int]) -> Cost:
    """Run it; it says what it stored. Counts this process's threads and the programs that ended meanwhile."""
    started, cpu = time.perf_counter(), _cpu_seconds()
    stored = work()
    return Cost(stored, time.perf_counter() - started, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


class Zstd:
    """Each image by itself, compressed as a whole."""

    name = "zstd -1"

    def __init__(self, disk: Path) -> None:
        self._directory = disk / "zstd"
        self._directory.mkdir()

    def save(self, image: Path) -> Cost:
        shutil.rmtree(self._directory)
        self._directory.mkdir()
        targets = [(path, self._directory / path.name) for path in image.iterdir()]

        def work() -> int:
            for path, target in targets:
                subprocess.run(["zstd", "-1", "-q", path, "-o", target], check=True)
            return sum(target.stat().st_size for _, target in targets)

        return measured(work)

    def restore(self, target: Path) -> Cost:
        target.mkdir()

        def work() -> int:
            for path in self._directory.iterdir():
                subprocess.run(["zstd", "-d", "-q", path, "-o", target / path.name], check=True)
            return 0

        return measured(work)


class Restic:
    """One repository for the whole series, which it encrypts; every image at the same path."""

    name = "restic"

    def __init__(self, disk: Path, image: Path) -> None:
        self._image = image
        self._repository = disk / "restic"
        self._environment = {
            **os.environ,
            "RESTIC_REPOSITORY": str(self._repository),
            "RESTIC_PASSWORD": "of a benchmark",
            "RESTIC_CACHE_DIR": str(disk / "restic-cache"),
        }
        self._run("init")

    def save(self) -> Cost:
        before = size_of(self._repository)
        cost = measured(lambda: self._run("backup", str(self._image)))
        return Cost(size_of(self._repository) - before, cost.seconds, cost.cpu_seconds)

    def restore(self, target: Path) -> Cost:
        return measured(lambda: self._run("restore", "latest", "--target", str(target)))

    def _run(self, *words: str) -> int:
        subprocess.run(["restic", "--quiet", *words], env=self._environment, check=True)
        return 0


def copy(image: Path, target: Path) -> Cost:
    def work() -> int:
        subprocess.run(["cp", "-r", image, target], check=True)
        return 0

    return measured(work)


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
