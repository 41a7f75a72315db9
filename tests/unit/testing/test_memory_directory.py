"""What tests keep in memory does not stay there: not of this run, and not of one that was killed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests import memory

ROOT = Path(__file__).resolve().parents[3]
HOLDER = """
import sys
from tests.memory import memory_directory
with memory_directory() as made:
    print(made, flush=True)
    sys.stdin.read()
"""


def holder() -> tuple[subprocess.Popen[str], Path]:
    """A process that has such a directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_directory_of_a_killed_run_is_swept_and_a_living_ones_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_OLD_SECONDS", -1)
    living, lives = holder()
    killed, left = holder()
    try:
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert left.is_dir()
        # Only these two are looked at: others of this machine may be of runs that are younger than an hour.
        beside = left.with_name("beside-" + left.name)
        beside.mkdir()
        for path in (left, lives):
            path.rename(beside / path.name)
        memory.sweep(beside)
        assert [path.name for path in beside.iterdir()] == [lives.name]
        (beside / lives.name).rename(lives)
    finally:
        living.communicate()
    assert not lives.exists()
    shutil.rmtree(beside)


def test_directory_is_gone_after_use() -> None:
    with memory.memory_directory() as made:
        (made / "file").write_bytes(os.urandom(10))
    assert not made.exists()
