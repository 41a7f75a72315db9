"""An agent that takes far too much at once is stopped by the kernel, is parked, and goes on with more."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.crash.witness import check_nothing_left
from tests.stage import Stage

from torpor.sandbox.cgroups import cgroup_for

pytestmark = [
    pytest.mark.runsc,
    pytest.mark.timeout(300),
    pytest.mark.skipif(cgroup_for("probe") is None, reason="no cgroup with a limit can be made here"),
]

GREEDY = """
import os, sys, time
from torpor.agent import checkpoint, send
send("before")
checkpoint()
send("after")
while sys.argv[1:] and open("/run/torpor/incarnation").read() == "1\\n" and not os.path.exists("go"):
    time.sleep(0.05)
taken = bytearray(512 << 20)
for at in range(0, len(taken), 4096):
    taken[at] = 1
print(len(taken) >> 20)
"""
NEARLY_FULL = """
import os
from torpor.agent import checkpoint
taken = [os.urandom(10 << 20) for _ in range(9)]
for number in range(3):
    taken[number] = os.urandom(10 << 20)
    checkpoint()
print(sum(map(len, taken)) >> 20)
"""
PARKED = 79


def data_of(stage: Stage, kind: str) -> list[dict[str, Any]]:
    return [event["data"] for event in stage.events("one") if event["kind"] == kind]


def start(stage: Stage, agent: str, *arguments: str, **variables: str):
    (stage.project / "agent.py").write_text(agent)
    command = ("--memory", "128M", "--", sys.executable, "agent.py", *arguments)
    return stage.node("run", "--name", "one", *command, **variables)


def cgroups_of(stage: Stage) -> list[Path]:
    return [Path(note.read_text()) for note in (stage.home / "runsc").glob("*.cgroup")]


def check_parked_and_finish(stage: Stage, made: list[Path]) -> None:
    """It sleeps and takes nothing; with more memory it ends as if nothing had been."""
    [exceeded] = data_of(stage, "memory.exceeded")[-1:]
    assert exceeded["killed"] is True
    assert exceeded["limit_bytes"] == 128 << 20
    assert 128 << 20 <= exceeded["used_bytes"] < 256 << 20
    assert "parked at its last checkpoint: it took more than 128 MiB" in (stage.directory / "node.log").read_text()
    assert stage.rows("ls")[0]["status"] == "asleep"
    assert stage.sandbox_pids() == []
    assert cgroups_of(stage) == []
    assert not any(path.exists() for path in made)
    assert "memory_too_small" in stage.torpor("resume", "one", check=False).stderr
    assert stage.torpor("resume", "--memory", "2G", "one").stdout == "512\n"
    assert data_of(stage, "recovery.chosen")[-1]["mode"] == "restore"
    assert [message["data"]["number"] for message in stage.events("one") if message["kind"] == "message.sent"] == [1, 2]
    stage.torpor("log", "one", "--verify")
    check_nothing_left(stage)
    assert cgroups_of(stage) == []


def test_it_is_stopped_at_the_wall_and_goes_on_from_its_checkpoint_with_more(quick: Stage) -> None:
    assert start(quick, GREEDY).wait(300) == PARKED
    assert len(data_of(quick, "incarnation.started")) == 1
    check_parked_and_finish(quick, [])


def test_a_node_that_dies_when_it_was_stopped_leaves_a_session_that_is_parked_by_the_next(quick: Stage) -> None:
    assert start(quick, GREEDY, TORPOR_CRASH_POINT="memory.exceeded").wait(300) == -signal.SIGKILL
    made = cgroups_of(quick)
    assert quick.node("resume", "one").wait(300) == PARKED
    check_parked_and_finish(quick, made)


def test_the_wall_stands_around_a_sandbox_that_another_node_adopted(quick: Stage) -> None:
    node = start(quick, GREEDY, "waits")
    log = quick.follow("one")
    log.wait("call.delivered", 3)
    [made] = cgroups_of(quick)[:1]
    node.kill()
    node.wait()
    second = quick.node("resume", "one")
    log.wait("recovery.chosen", 2)
    [workspace] = quick.home.glob("sessions/*/incarnations/1/workspace")
    (workspace / "go").touch()
    assert second.wait(300) == PARKED
    log.close()
    assert [chosen["mode"] for chosen in data_of(quick, "recovery.chosen")] == ["boot", "adopt"]
    check_parked_and_finish(quick, [made])


def test_saves_of_one_that_is_nearly_full_are_not_stopped(quick: Stage) -> None:
    """Its image takes as much again, for the next one too, and is the sandbox's by the kernel's account."""
    assert start(quick, NEARLY_FULL).wait(300) == 0
    assert quick.torpor("output", "one").stdout == "90\n"
    assert data_of(quick, "memory.exceeded") == []
    assert [point["reason"] for point in data_of(quick, "checkpoint.committed")].count("agent") == 3
    assert data_of(quick, "checkpoint.failed") == []
    check_nothing_left(quick)
