"""The README's tour, command by command, as a stranger would type it."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOUR_PORT = "4199"
EXPECTED = (
    "none: resume it",
    "torpor: restored checkpoint ",
    '[report] {"memory": 8, "mapped": 8, "sqlite": 8, "subprocess": 8, "background": {"ticker": null}}',
    "is whole: chain, numbers, parents, requests and answers agree",
    "+ journal.db",
    "files written to tour-files",
)
"""What must be seen on the way; the README shows the same."""


def console_commands(page: str) -> list[str]:
    """The lines behind `$ ` in a page's console blocks."""
    blocks = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def run_console(page: str, *, cwd: Path, environment: dict[str, str], replace: dict[str, str]) -> str:
    """Run a page's commands in one shell; their output, stderr included. Every command must succeed."""
    script = "\n".join(["set -e", *console_commands(page)])
    for old, new in replace.items():
        script = script.replace(old, new)
    # A file, not a pipe: the model server of a tour that failed half-way would keep a pipe open.
    with tempfile.TemporaryFile("w+") as seen:
        shell = subprocess.Popen(
            ["bash", "-c", script],
            cwd=cwd,
            env=environment,
            stdout=seen,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = shell.wait(timeout=500)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
        seen.seek(0)
        output = seen.read()
    assert status == 0, output
    return output


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.runsc
@pytest.mark.timeout(600)
def test_the_tour_of_the_readme_works_as_it_is_written(tmp_path: Path, runsc: Path) -> None:
    page = (ROOT / "README.md").read_text()
    cwd = tmp_path / "tour"
    cwd.mkdir()
    (cwd / "examples").symlink_to(ROOT / "examples")
    with tempfile.TemporaryDirectory(prefix="torpor-tour-", ignore_cleanup_errors=True) as home:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TORPOR_HOME": home,
            "TORPOR_RUNSC": str(runsc),
            "NO_COLOR": "1",
        }
        try:
            output = run_console(page, cwd=cwd, environment=environment, replace={TOUR_PORT: free_port()})
        finally:
            for verb in ("kill", "rm"):
                subprocess.run(["torpor", verb, "tour"], env=environment, capture_output=True, check=False)
    for words in EXPECTED:
        assert words in output, output
    assert (cwd / "tour-files/journal.db").exists()


def test_the_tour_shows_what_is_checked() -> None:
    tour = (ROOT / "README.md").read_text()
    assert [words for words in EXPECTED if words not in tour] == []
