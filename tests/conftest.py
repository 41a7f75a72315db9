"""What the whole suite shares: the runsc that set-up found, and the rule that CI skips nothing it should run."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.seaweedfs import SeaweedFS, seaweedfs

from torpor.config import torpor_home
from torpor.core.clock import SystemClock
from torpor.core.errors import MachineUnfit
from torpor.sandbox.tools import find_runsc


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--crash-kills", type=int, default=12, help="how many times the crash test kills")
    parser.addoption("--crash-seed", type=int, default=1, help="of the crash test's random choices")
    parser.addoption("--crash-minutes", type=float, default=600, help="after so many the lives test begins no home")
    parser.addoption("--matrix", action="store_true", help="run all of tests/matrix instead of a sample")
    parser.addoption("--matrix-table", help="file for the table of clients and faults")


@pytest.fixture(scope="session")
def runsc() -> Path:
    """The runsc of this machine; without one the test is skipped, except in CI."""
    try:
        return find_runsc(torpor_home(os.environ) / "bin", os.environ, SystemClock()).path
    except MachineUnfit as unfit:
        if os.environ.get("CI"):
            pytest.fail(f"CI has no runsc: {unfit}")
        pytest.skip(str(unfit))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A real S3 server; tests keep to buckets of their own."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs", numbered=True)) as server:
        yield server


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A short-named directory of the test's own, gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="torpor-test-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a test starts takes Ctrl-C, as at a terminal: a run in the background ignores it, and so would they."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
