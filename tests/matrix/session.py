"""One session of a client that is killed once at each point of the matrix, and what is claimed of it at its end.

Everything is seen from outside: the agent's output, the command's events, and what the model's witness counted.
"""

import asyncio
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.crash.witness import check_nothing_left, check_order
from tests.e2e.clients.client_session import UNWANTED, Output
from tests.matrix.clients import Client
from tests.matrix.model import POINTS, WAITING, MatrixModel, Point, running
from tests.stage import REAL_KEY, Log, Stage

from torpor.core.checkpoint import Checkpoint
from torpor.core.clock import SystemClock
from torpor.db import checkpoints, sessions
from torpor.db.database import Transaction, open_database

NAME = "matrix"
POINT_SECONDS = 90
GATEWAY_URL = "http://127.0.0.1:4100"
TURNS = len(POINTS) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixSession:
    """A client at work under `torpor run`."""

    client: Client
    stage: Stage
    model: MatrixModel
    node: subprocess.Popen[str]
    output: Output
    log: Log

    def kill_at(self, turn: int) -> None:
        """Checkpoint the session at the turn's point, kill -9 its sandbox, and let it go on once it is restored."""
        point, body_bytes = POINTS[turn - 1], 0
        if point is Point.BETWEEN_TURNS:
            self._await_waiting_tool()
        else:
            body_bytes = self.model.await_stop(turn).body_bytes
            self.log.wait("call.sent", turn)
        self._checkpoint(point, body_bytes)
        restored = self.kill_and_restore(turn)
        assert _is_of(point, body_bytes, restored), f"restored from checkpoint {restored}, which is not of {point}"
        if point is not Point.BETWEEN_TURNS:
            self.model.release(turn)

    def kill_and_restore(self, number: int) -> Checkpoint:
        """The session's kill of that number, from 1; it goes back to its newest checkpoint, which is given."""
        made = self.newest_checkpoint()
        assert self.stage.sandbox_pids(), "there is no sandbox to kill"
        self.stage.kill_sandbox()
        chosen = self.log.wait("recovery.chosen", 1 + number)["data"]  # The first one is the boot.
        # A cut that was under way at the kill is committed before the restore, and then it is the newest.
        newest = self.newest_checkpoint()
        rejected = [event["data"] for event in self.stage.events(NAME) if event["kind"] == "recovery.rejected"]
        restored = (chosen["mode"], chosen["checkpoint"])
        assert restored == ("restore", newest.number), f"{restored}, {made.number} was made; {rejected}"
        return newest

    def end(self) -> str:
        """Wait for the agent's end; gives what it wrote."""
        text = self.output.whole()
        notices = (self.stage.directory / "node.log").read_text()
        assert self.node.returncode == 0, f"exit status {self.node.returncode}; {notices[-3000:]}"
        return text

    def newest_checkpoint(self) -> Checkpoint:
        def work(tx: Transaction) -> Checkpoint:
            found = checkpoints.list_intact(tx, sessions.find(tx, NAME).session_id)
            return max(found, key=lambda checkpoint: checkpoint.number)

        async def read() -> Checkpoint:
            database = await open_database(f"sqlite://{self.stage.home}/torpor.db", clock=SystemClock())
            try:
                return await database.read(work)
            finally:
                await database.close()

        return asyncio.run(read())

    def _checkpoint(self, point: Point, body_bytes: int) -> None:
        """Make checkpoints until one is of the point: the agent has all that the model sent so far, and no more."""
        deadline = time.monotonic() + POINT_SECONDS
        while True:
            assert time.monotonic() < deadline, f"the session never came to {point}"
            self.stage.torpor("checkpoint", NAME)
            if _is_of(point, body_bytes, self.newest_checkpoint()):
                return

    def _await_waiting_tool(self) -> None:
        deadline = time.monotonic() + POINT_SECONDS
        while not any((self.stage.home / "sessions").glob(f"**/{WAITING}")):
            assert time.monotonic() < deadline, f"the tool never ran; the agent wrote {self.output.text!r}"
            time.sleep(0.05)

    def check(self, text: str) -> None:
        """Each turn was asked for once, answered whole and believed as it was; each tool ran once; the log is whole."""
        self._check_witness()
        self._check_transcript(text)
        self._check_log()
        check_nothing_left(self.stage)
        pulled = self.stage.directory / "pulled"
        self.stage.torpor("pull", NAME, str(pulled))
        assert (pulled / "trail.txt").read_text().split() == [str(turn + 1) for turn in range(len(POINTS))]

    def _check_witness(self) -> None:
        """Invariants 1 and 6: no node died, so each call was sent once."""
        tries = self.model.tries()
        assert [one["attempt"] for one in tries] == [1] * len(tries), tries
        assert {one["outcome"] for one in tries} == {"complete"}, tries
        assert [one["tool_results"] for one in tries] == list(range(TURNS)), tries
        assert all(one["stream"] for one in tries), "it did not stream"

    def _check_transcript(self, text: str) -> None:
        """Invariant 2: what the client shows, and what it tells the model that it was told, is what the model said."""
        said = self.model.said
        assert self.client.texts(text) == (said if self.client.shows_all else said[-1:])
        last = self.model.requests[-1].body.decode()
        for words in said[:-1]:
            assert last.count(words) == 1, f"{words!r} is {last.count(words)} times in the last request"
        results = re.findall(r"(?<!echo )ran (\d)", last)
        assert results == [str(turn + 1) for turn in range(len(POINTS))]

    def _check_log(self) -> None:
        events: list[dict[str, Any]] = self.stage.events(NAME)
        check_order(events)
        kinds = [event["kind"] for event in events]
        assert not [kind for kind in kinds if kind in UNWANTED], kinds
        thought = kinds.count("call.sent")
        assert thought == kinds.count("call.completed") == len(self.model.requests), kinds
        assert kinds.count("recovery.chosen") == 1 + len(POINTS), kinds
        assert "is whole" in self.stage.torpor("log", NAME, "--verify").stdout


def _is_of(point: Point, body_bytes: int, checkpoint: Checkpoint) -> bool:
    """The agent had all that the model sent until it stood still, and no more."""
    taken = [stream.taken for stream in checkpoint.open_streams]
    match point:
        case Point.BETWEEN_TURNS:
            return not taken
        case Point.BEFORE_HEADERS:
            return taken == [0]
        case Point.AFTER_HEADERS | Point.MID_TEXT | Point.MID_TOOL_CALL:
            # A chunk's frame comes with each piece, so what was taken in is more than the pieces are.
            return bool(taken) and taken[0] > body_bytes


@contextmanager
def matrix_session(
    directory: Path, runsc: Path, client: Client, model_class: type[MatrixModel] = MatrixModel
) -> Iterator[MatrixSession]:
    """Start a client as a session; nothing of it is left afterwards."""
    started = client.start(GATEWAY_URL)
    project = directory / "project"
    project.mkdir(parents=True)
    for file in started.files:
        shutil.copy(file, project)
    made_model = model_class(key=REAL_KEY, witness_path=directory / "witness.jsonl")
    with running(made_model) as model, ExitStack() as undo:
        made = Stage(directory=directory, environment=_environment(directory, runsc, model.url))
        notices = undo.enter_context((directory / "node.log").open("w"))
        options = [word for mount in started.mounts for word in ("--mount", str(mount))]
        options += [word for pair in started.variables.items() for word in ("--env", "=".join(pair))]
        run = ("run", "--name", NAME, *options, "--", *started.command)
        node = made.start(*run, stdout=subprocess.PIPE, stderr=notices)
        output = Output(node)
        undo.callback(output.close)
        undo.callback(made.close)
        # The model's last word: a client that waits for it would keep the node from its end.
        undo.callback(model.release_all)
        log = made.follow(NAME)
        undo.callback(log.close)
        yield MatrixSession(client=client, stage=made, model=model, node=node, output=output, log=log)


def _environment(directory: Path, runsc: Path, url: str) -> dict[str, str]:
    """This process's, with a home of its own and the scripted model as both providers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "ANTHROPIC_"))}
    return {
        **kept,
        "TORPOR_HOME": str(directory / "home"),
        "TORPOR_RUNSC": str(runsc),
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_KEY": REAL_KEY,
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": REAL_KEY,
    }
