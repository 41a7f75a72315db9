"""A sandbox that dies while it is filled: its checkpoint goes into a new one, and no memory is lost by that."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.stage import PATIENCE_SECONDS, Stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]
WAITING = "touch begun; until [ -e gate ]; do sleep 0.05; done; exit 4"


def wait_until(found: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not found():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.02)


def kernels(stage: Stage, incarnation: int) -> list[int]:
    """The pid of that incarnation's sandbox, once its driver has made it."""
    states = [json.loads(file.read_text()) for file in (stage.home / "runsc").glob(f"*-{incarnation}.state")]
    return [state["sandbox"]["pid"] for state in states if state["status"] in {"created", "running"}]


def drivers_command_runs(stage: Stage) -> bool:
    found = subprocess.run(["pgrep", "-f", f"--root={stage.home}/runsc .* create "], capture_output=True, check=False)
    return found.returncode == 0


def test_a_slot_that_dies_while_it_is_filled_costs_no_checkpoint(quick: Stage) -> None:
    node = quick.node("--verbose", "run", "--name", "one", "--", "bash", "-c", WAITING)
    log = quick.follow("one")
    log.wait("recovery.chosen")  # The session is listed before its first sandbox has a directory.
    incarnations = next((quick.home / "sessions").glob("*/incarnations"))

    def in_workspace(number: int, name: str) -> Path:
        return incarnations / str(number) / "workspace" / name

    wait_until(in_workspace(1, "begun").exists, "the agent")
    quick.torpor("checkpoint", "one")  # The first one, behind which the slot is made.
    wait_until(lambda: bool(kernels(quick, 2)) and not drivers_command_runs(quick), "the slot")
    [slot], [sandbox] = kernels(quick, 2), kernels(quick, 1)

    # A process that stands still takes connections and answers nothing: the slot is found alive, and dies in its use.
    os.kill(slot, signal.SIGSTOP)
    os.kill(sandbox, signal.SIGKILL)
    wait_until(in_workspace(2, "begun").exists, "the slot's workspace")
    os.kill(slot, signal.SIGKILL)

    chosen = log.wait("recovery.chosen", 2)["data"]
    assert (chosen["mode"], chosen["checkpoint"]) == ("restore", 1)
    in_workspace(2, "gate").touch()
    assert node.wait(PATIENCE_SECONDS) == 4
    log.close()
    assert [event for event in quick.events("one") if event["kind"] == "recovery.rejected"] == []
    assert "a sandbox died while it was filled" in (quick.directory / "node.log").read_text()
    assert quick.sandbox_pids() == []


def test_a_sandbox_that_dies_while_it_is_restored_costs_no_memory(quick: Stage) -> None:
    node = quick.node(
        "run", "--name", "one", "--", "bash", "-c", f"held=here; {WAITING.replace('exit 4', 'echo $held')}"
    )
    log = quick.follow("one")
    log.wait("recovery.chosen")
    incarnations = next((quick.home / "sessions").glob("*/incarnations"))
    wait_until((incarnations / "1/workspace/begun").exists, "the agent")
    quick.torpor("stop", "one")
    assert node.wait(PATIENCE_SECONDS) == 79

    # It stands still before anything is in it, so it dies in the middle of its restore, with nothing of it alive.
    resumed = quick.node("--verbose", "resume", "one", log="resumed.log")
    wait_until(lambda: bool(kernels(quick, 2)), "the sandbox")
    os.kill(kernels(quick, 2)[0], signal.SIGKILL)
    log.wait("recovery.chosen", 2)
    (incarnations / "2/workspace/gate").touch()
    assert resumed.wait(PATIENCE_SECONDS) == 0
    log.close()
    assert [event for event in quick.events("one") if event["kind"] == "recovery.rejected"] == []
    assert quick.torpor("output", "one").stdout == "here\n"
    assert "a sandbox died while it was filled" in (quick.directory / "resumed.log").read_text()
