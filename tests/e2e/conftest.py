"""Stages for whole sessions."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.stage import Stage, stage


@pytest.fixture
def quick(scratch: Path, runsc: Path) -> Iterator[Stage]:
    """A model that answers at once, for five turns."""
    with stage(scratch, runsc, ["--turns", "5"]) as made:
        yield made


@pytest.fixture
def lasting(scratch: Path, runsc: Path) -> Iterator[Stage]:
    """A session that does not end while a test asks things of it: ten turns of two seconds."""
    with stage(scratch, runsc, ["--turns", "10", "--first-byte-seconds", "0.2", "--chunk-seconds", "0.1"]) as made:
        yield made


@pytest.fixture
def slow(scratch: Path, runsc: Path) -> Iterator[Stage]:
    """A model whose answers take about two seconds, for five turns."""
    with stage(scratch, runsc, ["--turns", "5", "--first-byte-seconds", "0.2", "--chunk-seconds", "0.1"]) as made:
        yield made
