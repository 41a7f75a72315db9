"""A TORPOR_HOME with generated sessions, and the commands that look after its store, run as a user would."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torpor.core.clock import SystemClock
from torpor.core.ids import SessionId, new_node_id
from torpor.db import roots, sessions
from torpor.db.database import Transaction, open_database
from torpor.runtime.home import Home
from torpor.runtime.runtime import node_holder, open_runtime
from torpor.testing.generated import MadeUpMemory, generate_session

T = TypeVar("T")
HOUR_NS = 3600 * 10**9
BEGIN_NS = 1_700_000_000_000_000_000


@dataclass(frozen=True, slots=True)
class StoreStage:
    """One TORPOR_HOME below `directory`."""

    directory: Path

    @property
    def home(self) -> Path:
        return self.directory / "home"

    @property
    def store(self) -> Path:
        return self.home / "store"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "TORPOR_HOME": str(self.home)}

    def configure(self, text: str) -> None:
        (self.home / "config.toml").write_text(text)

    def torpor(self, *command: str, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "torpor", *command],
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, f"{command} exited with {done.returncode}:\n{done.stderr}{done.stdout}"
        return done

    def result(self, *command: str, **variables: str) -> dict[str, Any]:
        return json.loads(self.torpor(*command, "--json", **variables).stdout)

    def refused(self, *command: str, status: int) -> str:
        """The code of the error."""
        lines = self.torpor(*command, "--json", status=status).stdout.splitlines()
        return json.loads(lines[-1])["error"]["code"]

    def numbers(self, session: str) -> list[int]:
        lines = self.torpor("checkpoints", session, "--json").stdout.splitlines()
        return [json.loads(line)["number"] for line in lines]

    def kinds(self, session: str) -> list[str]:
        return [json.loads(line)["kind"] for line in self.torpor("log", session, "--json").stdout.splitlines()]

    def objects(self) -> dict[str, Path]:
        """By key."""
        found = [path for path in self.store.glob("*/*/*") if path.parent.parent.name != "partial"]
        return {f"{path.parent.parent.name}/{path.name}": path for path in found}

    def copy(self, directory: Path) -> "StoreStage":
        shutil.copytree(self.directory, directory, symlinks=True, ignore=shutil.ignore_patterns("images", "scratch"))
        return StoreStage(directory)

    def write(self, work: Callable[[Transaction], T]) -> T:
        """Change rows behind everybody's back."""

        async def opened() -> T:
            database = await open_database(Home(self.home).database_url, clock=SystemClock())
            try:
                return await database.write(work, durable=True)
            finally:
                await database.close()

        return asyncio.run(opened())

    def forget(self, session: str) -> SessionId:
        """The rows of a session, as `torpor rm` deletes them."""

        def work(tx: Transaction) -> SessionId:
            found = sessions.find(tx, session)
            sessions.forget(tx, session_id=found.session_id, owner_token=found.owner_token)
            return found.session_id

        return self.write(work)

    def roots(self) -> list[roots.Root]:
        return self.write(roots.list_roots)


def generate(stage: StoreStage, steps: dict[str, int], *, pages: int = 64, hours: Sequence[int] = ()) -> None:
    """Sessions by name, each with so many checkpoints after the first, an hour or so apart.

    One file of the workspace is new at each step and one stays from the first on, so each step's objects lie in packs
    of which little is needed later.
    """

    async def work() -> None:
        async with open_runtime(stage.environment, SystemClock()) as runtime:
            me = node_holder(runtime.home, new_node_id(BEGIN_NS))
            for number, (name, count) in enumerate(steps.items()):
                made = await generate_session(runtime, me, stage.directory / "scratch" / name, name=name)
                memory = MadeUpMemory(pages=pages, seed=number)
                for step in range(count):
                    memory.change(pages // 8)
                    memory.write(made.image / "pages.img")
                    (made.image / "kernel.img").write_bytes(os.urandom(100_000))
                    (made.workspace / f"kept{step}").write_bytes(os.urandom(200))
                    (made.workspace / "new").write_bytes(b"step %d" % step)
                    at = hours[step] if step < len(hours) else step
                    await made.checkpoint(wall_ns=BEGIN_NS + at * HOUR_NS)
                await made.close()

    asyncio.run(work())
