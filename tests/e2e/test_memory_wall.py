"""An agent that takes far too much at once is stopped by the kernel, is parked, and goes on with more."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from examples.demo.demo import Log
from tests.crash.witness import check_nothing_left
from tests.stage import Stage

from torpor.sandbox.cgroups import Cgroup, cgroup_at, cgroup_for

pytestmark = [
    pytest.mark.runsc,
    pytest.mark.timeout(600),
    pytest.mark.skipif(cgroup_for("probe") is None, reason="no cgroup with a limit can be made here"),
]

GREEDY = """
import os, time
from torpor.agent import checkpoint, send
send("before")
checkpoint()
send("after")
while open("/run/torpor/incarnation").read() == "1\\n" and not os.path.exists("go"):
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


def start(stage: Stage, agent: str, **variables: str) -> subprocess.Popen[str]:
    (stage.project / "agent.py").write_text(agent)
    return stage.node("run", "--name", "one", "--memory", "128M", "--", sys.executable, "agent.py", **variables)


def until_it_may_take_all(stage: Stage) -> Log:
    log = stage.follow("one")
    log.wait("call.delivered", 3)
    return log


def cgroup_of_first(stage: Stage) -> Cgroup:
    [note] = (stage.home / "runsc").glob("*-1.cgroup")
    return cgroup_at(Path(note.read_text()))


def take_all_at_once(stage: Stage, node: subprocess.Popen[str]) -> None:
    """From when the node can't look until the kernel has stopped it."""
    cgroup = cgroup_of_first(stage)
    [workspace] = stage.home.glob("sessions/*/incarnations/1/workspace")
    node.send_signal(signal.SIGSTOP)
    (workspace / "go").touch()
    while not cgroup.has_killed():
        time.sleep(0.05)  # The kernel tells nobody.
    node.send_signal(signal.SIGCONT)


def check_parked_and_finish(stage: Stage, cgroup: Cgroup) -> None:
    """It sleeps and takes nothing; with more memory it ends as if nothing had been."""
    assert stage.rows("ls")[0]["status"] == "asleep"
    assert stage.sandbox_pids() == []
    assert not cgroup.path.exists()
    assert "memory_too_small" in stage.torpor("resume", "one", check=False).stderr
    assert stage.torpor("resume", "--memory", "2G", "one").stdout == "512\n"
    assert data_of(stage, "recovery.chosen")[-1]["mode"] == "restore"
    assert [message["number"] for message in data_of(stage, "message.sent")] == [1, 2]
    stage.torpor("log", "one", "--verify")
    check_nothing_left(stage)
    assert list((stage.home / "runsc").glob("*.cgroup")) == []


def test_it_is_stopped_at_the_wall_and_goes_on_from_its_checkpoint_with_more(quick: Stage) -> None:
    node = start(quick, GREEDY)
    until_it_may_take_all(quick).close()
    cgroup = cgroup_of_first(quick)
    take_all_at_once(quick, node)
    assert node.wait(300) == PARKED
    assert len(data_of(quick, "incarnation.started")) == 1
    [exceeded] = data_of(quick, "memory.exceeded")
    assert exceeded == {"used_bytes": 128 << 20, "limit_bytes": 128 << 20, "killed": True}
    assert "parked at its last checkpoint: it took more than 128 MiB" in (quick.directory / "node.log").read_text()
    check_parked_and_finish(quick, cgroup)


def test_a_node_that_dies_when_it_was_stopped_leaves_a_session_that_is_parked_by_the_next(quick: Stage) -> None:
    node = start(quick, GREEDY, TORPOR_CRASH_POINT="memory.exceeded")
    until_it_may_take_all(quick).close()
    cgroup = cgroup_of_first(quick)
    take_all_at_once(quick, node)
    assert node.wait(300) == -signal.SIGKILL
    assert cgroup.path.exists()
    assert quick.node("resume", "one").wait(300) == PARKED
    check_parked_and_finish(quick, cgroup)


def test_the_wall_stands_while_no_node_is_there_and_around_what_another_one_adopts(quick: Stage) -> None:
    first = start(quick, GREEDY)
    log = until_it_may_take_all(quick)
    cgroup = cgroup_of_first(quick)
    first.kill()
    first.wait()
    second = quick.node("resume", "one")
    assert log.wait("recovery.chosen", 2)["data"]["mode"] == "adopt"
    log.close()
    take_all_at_once(quick, second)
    assert second.wait(300) == PARKED
    assert data_of(quick, "memory.exceeded")[0]["killed"] is True
    check_parked_and_finish(quick, cgroup)


def test_saves_of_one_that_is_nearly_full_are_not_stopped(quick: Stage) -> None:
    """Its image takes as much again, for the next one too, and is the sandbox's by the kernel's account."""
    assert start(quick, NEARLY_FULL).wait(300) == 0
    assert quick.torpor("output", "one").stdout == "90\n"
    assert data_of(quick, "memory.exceeded") == []
    assert [point["reason"] for point in data_of(quick, "checkpoint.committed")].count("agent") == 3
    assert data_of(quick, "checkpoint.failed") == []
    check_nothing_left(quick)
