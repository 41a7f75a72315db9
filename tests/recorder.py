"""Runs a program under native/powercut, which records what it does to the files of one directory."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from torpor.testing.powercut import Kind, Operation, read_record

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Recording:
    """What was done below `root`, which was empty before. The program says what it was told in the file `said`."""

    root: Path
    operations: list[Operation]

    @property
    def acknowledgements(self) -> list[int]:
        """The cuts right after the program was told of something."""
        said = f"{self.root}/said"
        return [n for n, op in enumerate(self.operations, 1) if op.kind is Kind.WRITE and op.path == said]

    def said_before(self, cut: int) -> list[str]:
        """What the program was told of before the cut, in lines."""
        lines = [self.operations[n - 1].data for n in self.acknowledgements if n <= cut]
        return b"".join(lines).decode().splitlines()


def record(directory: Path, *argv: str) -> Recording:
    """Run Python with `argv` and an empty directory below `directory` as its last argument."""
    folder = REPOSITORY / "native" / "powercut"
    subprocess.run(["make", "-s", "-C", folder], check=True)
    root, log_path = (directory / "root").resolve(), directory / "record"
    root.mkdir()
    environment = {
        **os.environ,
        "LD_PRELOAD": str(folder / "build" / "powercut.so"),
        "TORPOR_POWERCUT_ROOT": str(root),
        "TORPOR_POWERCUT_LOG": str(log_path),
    }
    subprocess.run([sys.executable, *argv, root], check=True, env=environment, cwd=REPOSITORY)
    return Recording(root, read_record(log_path))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
