"""A node daemon that dies at each step of sleep and wake: no answer is lost, none counts twice, nothing is left."""

import sys
from pathlib import Path

import pytest
from tests.crash.witness import check_nothing_left
from tests.e2e.test_hibernation import prepare
from tests.stage import Stage, stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(900)]

BY_ITSELF = [
    *("hibernate.begun", "checkpoint.cut", "checkpoint.imaged", "checkpoint.stored", "checkpoint.committed"),
    *("session.asleep", "hibernate.freed"),
]
BY_AN_ANSWER = ["waitpoint.resolved", "wake.begun"]
ALL_FROM = 100


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All points when the crash tests run for long; in the suite those that nothing else drives."""
    paused = metafunc.function is test_its_sandbox_stands_still
    points = ["session.asleep", *BY_AN_ANSWER] if paused else [*BY_ITSELF, *BY_AN_ANSWER]
    if metafunc.config.getoption("--crash-kills") < ALL_FROM:
        points = ["session.asleep"] if paused else [point for point in points if not point.startswith("checkpoint.")]
    metafunc.parametrize("point", points)


def test_nothing_is_left_of_a_sleeper(scratch: Path, runsc: Path, point: str) -> None:
    with stage(scratch, runsc) as made:
        prepare(made, paused=0, ready=0)
        die(made, point)


def test_its_sandbox_stands_still(scratch: Path, runsc: Path, point: str) -> None:
    with stage(scratch, runsc) as made:
        prepare(made, paused=600, ready=0)
        die(made, point)


def die(made: Stage, point: str) -> None:
    """Let the daemon, or who answers, die at a point, and see that the session ends well with the next daemon."""
    made.torpor("up", TORPOR_CRASH_POINT=point)
    made.torpor("run", "-d", "--name", "one", "--", sys.executable, "asking.py")
    log = made.follow("one")
    if point in BY_AN_ANSWER:
        log.wait("session.status", 4)
        # The answer is taken, although who was to say so may have died.
        made.torpor("resolve", "one", "yes", check=False, TORPOR_CRASH_POINT=point)
    if point == "waitpoint.resolved":
        made.kill_daemon()
    made.wait_for_death_of_daemon()
    made.torpor("up")
    if point not in BY_AN_ANSWER:
        made.torpor("resolve", "one", "yes")
    log.wait("agent.exited")
    log.close()
    assert made.torpor("output", "one").stdout == "yes resolved True\n"
    resolved = [event for event in made.events("one") if event["kind"] == "waitpoint.resolved"]
    assert sum("ask" in str(event["data"]) for event in resolved) == 1
    made.torpor("log", "one", "--verify")
    made.torpor("down")
    check_nothing_left(made)
