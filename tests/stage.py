"""A stage for whole sessions: a TORPOR_HOME, a scripted model with an outside witness, and the `torpor` command.

Everything is done as a user would do it: processes are started, killed and asked; nothing of Torpor is called. What
the witness counted and what the log says is read afterwards.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.demo.demo import Log

from torpor.runtime.leasing import is_held
from torpor.sandbox.cgroups import cgroup_at

ROOT = Path(__file__).resolve().parents[1]
TORPOR = [sys.executable, "-m", "torpor"]
AGENT = ROOT / "examples/coding_agent/agent.py"
REAL_KEY = "sk-real-0123456789abcdefghijklmnopqrstuvwxyz"
PATIENCE_SECONDS = 240
SLOWER = min(10.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1) / 2))
"""On a busy machine a command takes longer to ask a session something, and the session has to last as long."""


@dataclass(slots=True)
class Stage:
    """One TORPOR_HOME with its model server."""

    directory: Path
    environment: dict[str, str]
    command: Sequence[str] = tuple(TORPOR)
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    control: str = ""
    """URL of the model's control."""

    @property
    def home(self) -> Path:
        return self.directory / "home"

    @property
    def project(self) -> Path:
        return self.directory / "project"

    @property
    def witness(self) -> list[dict[str, Any]]:
        file = self.directory / "witness.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def start(self, *command: str, stdout: Any = None, stderr: Any = None, **variables: str) -> subprocess.Popen[str]:
        """Start a torpor command in the project directory."""
        process = subprocess.Popen(
            [*self.command, *_with_every_turn(command)],
            env={**self.environment, **variables},
            cwd=self.project,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )
        self.started.append(process)
        return process

    def torpor(self, *command: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a torpor command to its end."""
        finished = subprocess.run(
            [*self.command, *_with_every_turn(command)],
            env={**self.environment, **variables},
            cwd=self.project,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        if check and finished.returncode != 0:
            raise AssertionError(
                f"torpor {command} exited with {finished.returncode}:\n{finished.stderr}{finished.stdout}"
            )
        return finished

    def node(self, *command: str, log: str = "node.log", **variables: str) -> subprocess.Popen[str]:
        """Start a command that becomes a node, with its output in a file of the stage."""
        with (self.directory / log).open("a") as output:
            return self.start(*command, stdout=output, stderr=output, **variables)

    def rows(self, *command: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.torpor(*command, "--json").stdout.splitlines()]

    def events(self, session: str) -> list[dict[str, Any]]:
        return self.rows("log", session)

    def follow(self, session: str) -> Log:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not any(row["name"] == session for row in self.rows("ls")):
            assert time.monotonic() < deadline, f"session {session} never appeared"
        following = self.start("log", session, "--follow", "--json", stdout=subprocess.PIPE)
        return Log(following, patience_seconds=PATIENCE_SECONDS)

    def sandbox_pids(self) -> list[int]:
        """Every process of every sandbox of this home."""
        return self._pids_of("runsc-(sandbox|gofer) ")

    def kill_sandbox(self) -> None:
        self._kill(self.sandbox_pids())

    def kill_what_a_node_left(self) -> None:
        """All sandboxes, also one that a `runsc` command of a node that is dead was just about to begin."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while pids := self._pids_of("runsc.* --root="):
            assert time.monotonic() < deadline, f"they do not die: {pids}"
            self._kill(pids)

    def _pids_of(self, what: str) -> list[int]:
        found = subprocess.run(["pgrep", "-f", f"{what}.*{self.home}/"], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def _kill(self, pids: list[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_daemon(self) -> None:
        """As `kill -9`, if there is one."""
        lock = self.home / "run/daemon.lock"
        while lock.exists() and is_held(lock):
            said = lock.read_text()
            # One that has just begun has not said yet who it is.
            with suppress(json.JSONDecodeError, ProcessLookupError):
                os.kill(json.loads(said)["pid"], signal.SIGKILL)
                self.wait_for_death_of_daemon()

    def wait_for_death_of_daemon(self) -> None:
        with (self.home / "run/daemon.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)

    def close(self) -> None:
        self.kill_daemon()
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.kill_what_a_node_left()
        self._remove_cgroups()
        # A test that failed has not closed them, and Python would complain of that in the middle of another one.
        for process in self.started:
            if process.stdout is not None:
                process.stdout.close()
            if process.stderr is not None:
                process.stderr.close()
        shutil.rmtree(self.home, ignore_errors=True)

    def _remove_cgroups(self) -> None:
        """Those of sandboxes that nobody swept: with the home goes the note of where they are."""
        deadline = time.monotonic() + 10
        for note in (self.home / "runsc").glob("*.cgroup"):
            cgroup = cgroup_at(Path(note.read_text()))
            while not cgroup.remove() and time.monotonic() < deadline:
                time.sleep(0.05)


def _with_every_turn(command: Sequence[str]) -> list[str]:
    """Tests count on a checkpoint at every turn, however slow the machine is just now, unless they say otherwise."""
    words = list(command)
    if "run" in words[:2] and not any(word.startswith("--checkpoint-share") for word in words):
        words.insert(words.index("run") + 1, "--checkpoint-share=always")
    return words


@contextmanager
def model_server(directory: Path, arguments: Sequence[str], *, key: str = REAL_KEY) -> Iterator[tuple[str, str]]:
    """The scripted model in a process of its own; gives its URL and the URL of its control."""
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "torpor.testing.model_server", "--key", key),
            *("--witness", str(directory / "witness.jsonl"), *arguments),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        yield server.stdout.readline().strip(), server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


@contextmanager
def stage(directory: Path, runsc: Path, model_arguments: Sequence[str] = ()) -> Iterator[Stage]:
    """A stage with the coding agent in its project directory."""
    (directory / "project").mkdir(parents=True)
    shutil.copy(AGENT, directory / "project")
    with model_server(directory, model_arguments) as (url, control):
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "ANTHROPIC_"))},
            "TORPOR_HOME": str(directory / "home"),
            "TORPOR_RUNSC": str(runsc),
            "OPENAI_BASE_URL": f"{url}/v1",
            "OPENAI_API_KEY": REAL_KEY,
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_API_KEY": REAL_KEY,
        }
        made = Stage(directory=directory, environment=environment, control=control)
        try:
            yield made
        finally:
            made.close()
