"""One session of a real client: from `torpor run` through a kill -9 of its sandbox to its exit, and what is claimed.

Everything is seen from outside: the agent's output, the command's events, and what the model's witness counted.
"""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.crash.witness import check_nothing_left
from tests.e2e.clients.held_model import HeldModel, held_model
from tests.e2e.clients.key_search import files_with, snapshots_with
from tests.stage import PATIENCE_SECONDS, REAL_KEY, Log, Stage

from torpor.config import FAKE_KEY

TURNS = 3
HELD_TURN = 2
NAME = "client"
UNWANTED = ("call.torn", "call.failed", "call.diverged", "stream.reset")


class Output:
    """What a process writes to its stdout, read while it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._bytes = b""
        self._arrived = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def text(self) -> str:
        return self._bytes.decode(errors="replace")

    def wait_for(self, text: str) -> None:
        with self._arrived:
            found = self._arrived.wait_for(lambda: text in self.text or self._ended, PATIENCE_SECONDS)
        assert found and text in self.text, f"{text!r} never came; the agent wrote {self.text!r}"

    def whole(self) -> str:
        """Everything, once the process has ended."""
        self._process.wait(PATIENCE_SECONDS)
        self._thread.join(PATIENCE_SECONDS)
        return self.text

    def close(self) -> None:
        self._thread.join(PATIENCE_SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        while piece := os.read(self._process.stdout.fileno(), 65536):
            with self._arrived:
                self._bytes += piece
                self._arrived.notify_all()
        with self._arrived:
            self._ended = True
            self._arrived.notify_all()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSession:
    """A client at work under `torpor run`, whose model stands still in its second answer."""

    stage: Stage
    model: HeldModel
    node: subprocess.Popen[str]
    output: Output
    log: Log

    def await_checkpoint(self, number: int) -> None:
        """Wait until checkpoint `number` is durable; the one of the seeded workspace has number 0."""
        self.log.wait("checkpoint.committed", number + 1)

    def kill_in_mid_answer(self) -> None:
        """kill -9 of the sandbox; the rest of the answer comes when the node has restored it."""
        self.log.wait("call.sent", HELD_TURN)
        assert self.log.count("call.completed") == HELD_TURN - 1, "the answer is complete already"
        assert self.stage.sandbox_pids(), "there is no sandbox to kill"
        self.stage.kill_sandbox()
        chosen = self.log.wait("recovery.chosen", 2)
        assert chosen["data"]["mode"] == "restore"
        self.model.release()

    def end(self) -> str:
        """Wait for the agent's end; gives what it wrote."""
        text = self.output.whole()
        assert self.node.returncode == 0, f"exit status {self.node.returncode}; {self.notices()}"
        return text

    def notices(self) -> str:
        return (self.stage.directory / "node.log").read_text()

    def events(self) -> list[dict[str, Any]]:
        return self.stage.events(NAME)

    def check(self, *, output_differs: bool = False) -> None:
        """Each turn was asked for once and answered whole, each tool ran once, and the log is whole."""
        tries = self.model.tries()
        assert [one["attempt"] for one in tries] == [1] * len(tries), tries
        assert {one["outcome"] for one in tries} == {"complete"}, tries
        assert [one["tool_results"] for one in tries] == list(range(TURNS + 1)), tries
        kinds = [event["kind"] for event in self.events()]
        assert kinds.count("call.sent") == kinds.count("call.completed") == len(tries), kinds
        assert not [kind for kind in kinds if kind in UNWANTED], kinds
        assert ("output.differed" in kinds) == output_differs
        assert "is whole" in self.stage.torpor("log", NAME, "--verify").stdout
        check_nothing_left(self.stage)
        self._check_workspace()
        self._check_keys()

    def _check_workspace(self) -> None:
        """Step 3 of the task adds a line to a file: there is one."""
        pulled = self.stage.directory / "pulled"
        self.stage.torpor("pull", NAME, str(pulled))
        assert (pulled / "trail.txt").read_text() == "2\n"
        assert "# Plan" in (pulled / "plan.md").read_text()

    def _check_keys(self) -> None:
        """The model server took the real key alone, and it is nowhere in TORPOR_HOME; the fake one is, in memory."""
        assert {request.credential for request in self.model.requests} == {REAL_KEY}
        assert files_with(REAL_KEY, self.stage.home) == []
        assert snapshots_with(REAL_KEY, self.stage.home) == []
        assert any(name.endswith("pages.img") for name in snapshots_with(FAKE_KEY, self.stage.home))
        assert not any(name.startswith("store/") for name in files_with(FAKE_KEY, self.stage.home))


@contextmanager
def client_session(
    directory: Path,
    runsc: Path,
    *,
    command: Sequence[str],
    options: Sequence[str] = (),
    files: Sequence[Path] = (),
) -> Iterator[ClientSession]:
    """Start a command as a session in a workspace that holds the given files; nothing of it is left afterwards."""
    project = directory / "project"
    project.mkdir(parents=True)
    for file in files:
        shutil.copy(file, project)
    witness = directory / "witness.jsonl"
    with held_model(turns=TURNS, held_turn=HELD_TURN, key=REAL_KEY, witness_path=witness) as model:
        made = Stage(directory=directory, environment=_environment(directory, runsc, model.url))
        with ExitStack() as undo:
            notices = undo.enter_context((directory / "node.log").open("w"))
            run = ("run", "--name", NAME, *options, "--", *command)
            node = made.start(*run, stdout=subprocess.PIPE, stderr=notices)
            output = Output(node)
            undo.callback(output.close)
            undo.callback(made.close)
            log = made.follow(NAME)
            undo.callback(log.close)
            yield ClientSession(stage=made, model=model, node=node, output=output, log=log)


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
