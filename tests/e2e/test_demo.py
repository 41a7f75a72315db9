"""The demo is the promise in one command: it must hold on any machine, and leave nothing behind."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]


def start_demo(runsc: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, ROOT / "examples/demo/demo.py"],
        env={**os.environ, "TORPOR_RUNSC": str(runsc), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def check_nothing_left(output: str) -> None:
    found = re.search(r"TORPOR_HOME=(\S+)/home", output)
    assert found, output
    left = subprocess.run(["pgrep", "-af", found[1]], capture_output=True, text=True, check=False).stdout
    assert left == ""
    assert not Path(found[1]).exists()
    session = re.search(r"session (ses_\w+)", output)
    assert not session or list(Path("/dev/shm").glob(f"torpor-*/{session[1]}")) == []


def test_the_demo_loses_nothing_and_tears_the_one_call_that_its_node_died_in(runsc: Path) -> None:
    demo = start_demo(runsc)
    output, _ = demo.communicate()
    assert demo.returncode == 0, output
    assert "12 x 1, 1 x 2 (reported as torn: 1)" in output
    check_nothing_left(output)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("moment", ["a coding agent starts", "kill -9 of the sandbox"])
def test_ctrl_c_in_the_demo_leaves_nothing_behind(runsc: Path, moment: str) -> None:
    demo = start_demo(runsc)
    assert demo.stdout is not None
    output = ""
    while moment not in output:
        line = demo.stdout.readline()
        assert line, output
        output += line
    os.killpg(demo.pid, signal.SIGINT)
    rest, _ = demo.communicate()
    assert demo.returncode == 130, output + rest
    check_nothing_left(output + rest)
