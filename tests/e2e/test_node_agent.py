"""A Node agent with a process, a server, a worker, timers and files of its own sleeps, and finds all of them."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tests.crash.witness import check_nothing_left
from tests.e2e.asleep import forget_all_but_the_store, sleep_deeply, wait_until_asleep
from tests.stage import PATIENCE_SECONDS, Stage

pytestmark = [
    pytest.mark.runsc,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node"),
]

AGENT = Path(__file__).parent / "agents/node_agent.mjs"
AS_IT_WAS = {
    "shell": {"same": True, "kept": True},
    "connection": ["1 first", "2 second"],
    "new_connection": "1 hello",
    "worker": True,
    "unlinked_file": True,
    "alarms": 1,
    "ticks_on": True,
    "shell_exit": 0,
}
SLEPT_SECONDS = 8
"""Longer than the agent's alarm takes, and its `fetch` is patient."""


def run_until_asleep(stage: Stage) -> None:
    """A session `one` of which nothing is left but what the store has."""
    sleep_deeply(stage, linger=1)
    shutil.copy(AGENT, stage.project)
    stage.torpor("run", "-d", "--name", "one", "--", "node", AGENT.name)
    log = stage.follow("one")
    wait_until_asleep(log)
    log.close()
    forget_all_but_the_store(stage, "one")


def said(stage: Stage, session: str) -> dict[str, Any]:
    found = json.loads(stage.torpor("output", session).stdout)
    assert isinstance(found, dict)
    return found


def test_a_node_agent_finds_everything_as_it_was(quick: Stage) -> None:
    run_until_asleep(quick)
    asked = next(event for event in quick.events("one") if event["kind"] == "waitpoint.created")
    while time.time_ns() < asked["wall_ns"] + SLEPT_SECONDS * 10**9:
        time.sleep(0.1)  # The wait is what is tested.
    quick.torpor("up")
    quick.torpor("resolve", "one", "yes")
    quick.torpor("wait", "one")
    found = said(quick, "one")
    assert {name: found[name] for name in AS_IT_WAS} == AS_IT_WAS
    assert found["answer"] == "yes"
    assert min(found["passed"].values()) >= SLEPT_SECONDS * 1000
    kinds = [event["kind"] for event in quick.events("one")]
    assert kinds.count("waitpoint.created") == kinds.count("waitpoint.resolved") == 1
    assert [event["data"]["mode"] for event in quick.events("one") if event["kind"] == "recovery.chosen"] == [
        "boot",
        "restore",
    ]
    quick.torpor("down")
    check_nothing_left(quick)


def test_children_of_a_sleeping_node_agent_find_everything_and_are_answered_each(quick: Stage) -> None:
    run_until_asleep(quick)
    quick.torpor("fork", "one", "--count", "2", "--name", "kid")
    names = ("one", "kid-1", "kid-2")
    for name in names:
        quick.torpor("resolve", name, f"to {name}")
        assert quick.node("resume", name, log=f"{name}.log").wait(PATIENCE_SECONDS) == 0
    for name in names:
        found = said(quick, name)
        assert {what: found[what] for what in AS_IT_WAS} == AS_IT_WAS
        assert found["answer"] == f"to {name}"
    check_nothing_left(quick)
