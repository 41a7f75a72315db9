"""Stages for whole sessions."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.stage import SLOWER, Stage, stage

WAITING_AGENT = """
import os
os.mkfifo("go")
open("go").read()
"""
"""Waits until somebody writes into its FIFO."""
PACE = ["--first-byte-seconds", "0.2", "--chunk-seconds", f"{0.1 * SLOWER:.2f}"]


@pytest.fixture
def quick(scratch: Path, runsc: Path) -> Iterator[Stage]:
    """A model that answers at once, for five turns."""
    with stage(scratch, runsc, ["--turns", "5"]) as made:
        yield made


@pytest.fixture
def lasting(scratch: Path, runsc: Path) -> Iterator[Stage]:
    """A session that does not end while a test asks things of it: ten turns of two seconds or more."""
    with stage(scratch, runsc, ["--turns", "10", *PACE]) as made:
        yield made


@pytest.fixture
def slow(scratch: Path, runsc: Path) -> Iterator[Stage]:
    """A model whose answers take about two seconds or more, for five turns."""
    with stage(scratch, runsc, ["--turns", "5", *PACE]) as made:
        yield made


@pytest.fixture
def waiting(quick: Stage) -> Iterator[Stage]:
    """A session `one` whose agent waits."""
    (quick.project / "waiting.py").write_text(WAITING_AGENT)
    quick.torpor("run", "-d", "--name", "one", "--", sys.executable, "waiting.py")
    log = quick.follow("one")
    log.wait("recovery.chosen")
    log.close()
    yield quick
    quick.torpor("kill", "one", check=False)
