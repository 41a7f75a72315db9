"""A TORPOR_HOME under disturbance, as a person with a shell has it: commands, a look at the rows, `kill -9`.

All acts are commands. Only what happens now is looked up in the database without one, read-only: a driver that waits
for signs of life would otherwise take more of the machine than what it waits for.
"""

import json
import random
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.crash.lives.warm import Command, Server
from tests.stage import PATIENCE_SECONDS, Stage, stage

from torpor.runtime.leasing import is_held

CONFIG = """\
[hibernate]
linger_seconds = 0.3
paused_seconds = {paused}
ready_seconds = {ready}
[retention]
keep_last = {keep}
keep_hourly = 0
keep_daily = 0
"""
LOOK_SECONDS = 0.02
LIVING_MAX = 6
"""Sessions with a name: who asks when there are so many is soon told that it is enough."""
ENDED = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A session as its row shows it."""

    session: str
    name: str | None
    status: str
    head_seq: int
    wake_ns: int | None

    @property
    def ended(self) -> bool:
        return self.status in ENDED


@dataclass(slots=True)
class Home:
    """See the module.

    Attributes:
        daemon: that was started last, if it was not started by `torpor up` itself.
    """

    stage: Stage
    server: Server
    daemon: Command | None = None
    started: list[Command] = field(default_factory=list)

    def start(self, *argv: str, **variables: str) -> Command:
        """Start a torpor command."""
        environment = {**self.stage.environment, **variables}
        output = tempfile.TemporaryFile()  # noqa: SIM115 - It is the command's, and closed with it.
        command = self.server.start(argv, environment=environment, cwd=self.stage.project, output=output)
        self.started.append(command)
        return command

    def torpor(self, *argv: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a torpor command to its end."""
        environment = {**self.stage.environment, **variables}
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            cwd = self.stage.project
            command = self.server.start(argv, environment=environment, cwd=cwd, output=output, errors=errors)
            status = command.wait()
            errors.seek(0)
            done = subprocess.CompletedProcess(argv, status, command.text(), errors.read().decode(errors="replace"))
        assert not check or status == 0, f"torpor {argv} exited with {status}:\n{done.stderr}{done.stdout}"
        assert "Traceback" not in done.stderr, f"torpor {argv}:\n{done.stderr}"
        return done

    def rows(self, *argv: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.torpor(*argv, "--json").stdout.splitlines()]

    def look(self, query: str, *arguments: object) -> list[Any]:
        """Rows of the database, as they are now."""
        with sqlite3.connect(f"file:{self.stage.home}/torpor.db?mode=ro", uri=True, timeout=60) as connection:
            found = connection.execute(query, arguments).fetchall()
        connection.close()
        return found

    def sessions(self) -> list[Row]:
        names = ("session_id", "name", "status", "head_seq", "wake_ns")
        found = self.look(f"SELECT {', '.join(names)} FROM session ORDER BY session_id")
        return [Row(session=row[0], name=row[1], status=row[2], head_seq=row[3], wake_ns=row[4]) for row in found]

    def living(self) -> list[Row]:
        return [row for row in self.sessions() if not row.ended]

    def events(self) -> int:
        """How many events all logs have together: what happens in this home is one more."""
        return self.look("SELECT COALESCE(SUM(head_seq), 0) FROM session")[0][0]

    def await_events(self, count: int, seconds: float, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Wait until so much has happened, or something else is over; False: it took longer than that."""
        before, deadline = self.events(), time.monotonic() + seconds
        while self.events() < before + count and not is_over():
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_SECONDS)
        return True

    def alive(self) -> bool:
        return is_held(self.stage.home / "run/daemon.lock")

    def up(self, *, replace: bool = False, point: str = "", itself: bool = False) -> None:
        """Have a node daemon, as systemd does it, or by `torpor up` itself; `point` is where it is to die."""
        variables = {"TORPOR_CRASH_POINT": point} if point else {}
        arguments = ["--replace"] if replace else []
        if itself:
            self.torpor("up", *arguments, check=False, **variables)
            return
        with (self.stage.home / "daemon.log").open("ab") as log:
            environment = {**self.stage.environment, **variables}
            argv = ("up", "--foreground", *arguments)
            before = self.daemon
            if before is not None and not replace:
                before.close()
            self.daemon = self.server.start(argv, environment=environment, cwd=self.stage.project, output=log)
        if replace and before is not None:
            before.wait()
            before.close()
        self._await_daemon(self.daemon)

    def _await_daemon(self, daemon: Command) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.alive() and Path(f"/proc/{daemon.pid}").exists():
            assert time.monotonic() < deadline, "the daemon does not start"
            time.sleep(LOOK_SECONDS)

    def close(self) -> None:
        for command in self.started:
            command.kill()
            command.close()
        self.started.clear()
        self.stage.kill_daemon()
        if self.daemon is not None:
            self.daemon.close()
        self.server.close()


@contextmanager
def make_home(directory: Path, runsc: Path, chance: random.Random, kept: Path) -> Iterator[Home]:
    """A home with the agent of these tests in its project; one that fails is kept."""
    pace = ["--script", "plain", "--first-byte-seconds", "0.2", "--chunk-seconds", "0.05"]
    with stage(directory, runsc, pace) as made:
        shutil.copy(Path(__file__).with_name("agent.py"), made.project / "agent.py")
        made.home.mkdir(exist_ok=True)
        paused, ready = chance.choice([(0, 0), (2, 0), (0, 2), (1, 2)])
        config = CONFIG.format(paused=paused, ready=ready, keep=chance.choice([4, 12, 100]))
        (made.home / "config.toml").write_text(config)
        home = Home(stage=made, server=Server(directory))
        try:
            yield home
        except BaseException:
            home.close()
            # What lives is stopped first, so that what is kept is what was found.
            made.kill_sandbox()
            shutil.copytree(directory, kept, symlinks=True, ignore=_no_sockets)
            raise
        finally:
            home.close()


def _no_sockets(directory: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if not (Path(directory) / name).is_file() and not (Path(directory) / name).is_dir()]
