"""An agent that takes too much memory is parked, and goes on where it was when it gets more."""

import json
import signal
import sys

import pytest
from tests.crash.witness import check_nothing_left
from tests.stage import Stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]

AGENT = """
import pathlib, sys, time
taken = []
while len(taken) < 20:
    taken.append(bytearray(b"x" * (10 << 20)))
    while len(taken) == 12 and sys.argv[1:] and pathlib.Path("/run/torpor/incarnation").read_text() == "1\\n":
        time.sleep(0.1)  # It takes what it may not, and goes on in another life.
print(len(taken), sum(map(len, taken)) >> 20)
"""
PARKED = 79


def data_of(stage: Stage, kind: str) -> list[dict[str, int]]:
    return [event["data"] for event in stage.events("one") if event["kind"] == kind]


def start(stage: Stage, **variables: str):
    (stage.project / "greedy.py").write_text(AGENT)
    return stage.node(
        "run", "--name", "one", "--memory", "128M", "--", sys.executable, "greedy.py", "wait", **variables
    )


def test_it_is_parked_at_the_mark_and_goes_on_with_more(quick: Stage) -> None:
    assert start(quick).wait(300) == PARKED
    [exceeded] = data_of(quick, "memory.exceeded")
    assert exceeded["limit_bytes"] == 128 << 20
    assert exceeded["used_bytes"] >= 115 << 20
    assert "parked: it takes" in (quick.directory / "node.log").read_text()
    assert quick.rows("ls")[0]["status"] == "asleep"
    assert quick.sandbox_pids() == []
    refused = quick.torpor("resume", "one", check=False)
    assert "memory_too_small" in refused.stderr
    assert "--memory" in refused.stderr
    assert quick.rows("ls")[0]["status"] == "asleep"
    assert quick.torpor("resume", "--memory", "1G", "one").stdout == "20 200\n"
    [chosen] = data_of(quick, "recovery.chosen")[1:]
    assert chosen["mode"] == "restore"
    assert "it may take 1024 MiB" in quick.torpor("log", "one").stdout
    quick.torpor("log", "one", "--verify")
    check_nothing_left(quick)


def test_a_node_that_dies_when_it_has_seen_that_leaves_a_session_that_is_parked_by_the_next(quick: Stage) -> None:
    assert start(quick, TORPOR_CRASH_POINT="memory.exceeded").wait(300) == -signal.SIGKILL
    assert quick.node("resume", "one").wait(300) == PARKED
    assert len(data_of(quick, "memory.exceeded")) == 1
    assert quick.torpor("resume", "--memory", "1G", "one").stdout == "20 200\n"
    check_nothing_left(quick)


def test_without_a_limit_nothing_is_parked_and_a_wrong_one_is_refused(quick: Stage) -> None:
    (quick.project / "greedy.py").write_text(AGENT)
    refused = quick.torpor("run", "--memory", "lots", "--", "true", check=False)
    assert refused.returncode == 64
    assert json.dumps("memory_malformed")[1:-1] in refused.stderr
    assert quick.torpor("run", "--name", "one", "--", sys.executable, "greedy.py").stdout == "20 200\n"
    assert data_of(quick, "memory.exceeded") == []
