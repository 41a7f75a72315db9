"""An agent with Chromium over DevTools keeps its page, its storage and the browser's processes across a whole sleep."""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.crash.witness import check_nothing_left
from tests.e2e.asleep import forget_all_but_the_store, sleep_deeply, wait_until_asleep
from tests.e2e.clients.chromium import Chromium, chromium
from tests.e2e.clients.npm import NotInstallable
from tests.stage import Stage, stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]

AGENT = Path(__file__).parent / "agents/browser_agent.py"
PNG = "89504e470d0a1a0a"
SLEPT_SECONDS = 8
KEPT = [
    *("variable", "title", "input", "list", "session_storage", "local_storage", "history", "worker", "indexed_db"),
]
"""Where the page has its secret."""


@pytest.fixture(scope="module")
def browser() -> Chromium:
    try:
        return chromium()
    except NotInstallable as error:
        pytest.skip(str(error))


@pytest.fixture
def made(scratch: Path, runsc: Path) -> Iterator[Stage]:
    with stage(scratch, runsc) as prepared:
        shutil.copy(AGENT, prepared.project)
        yield prepared


@pytest.mark.parametrize("by_hand", [False, True], ids=["by-itself", "by-hand"])
def test_a_browser_keeps_its_page(browser: Chromium, made: Stage, by_hand: bool) -> None:
    """A timer each second is no reason to stay awake. A page that animates is, for its node, but not for a person."""
    sleep_deeply(made, linger="never" if by_hand else 2)
    variables = ["--mount", str(browser.directory), "--env", f"LD_LIBRARY_PATH={browser.libraries}"]
    command = [sys.executable, AGENT.name, str(browser.program), *(["animated"] if by_hand else [])]
    made.torpor("run", "-d", "--name", "one", *variables, "--", *command)
    log = made.follow("one")
    asked = log.wait("waitpoint.created")
    if by_hand:
        made.torpor("hibernate", "one")
    wait_until_asleep(log)
    log.close()
    forget_all_but_the_store(made, "one")
    while time.time_ns() < asked["wall_ns"] + SLEPT_SECONDS * 10**9:
        time.sleep(0.1)  # The wait is what is tested.

    made.torpor("up")
    made.torpor("resolve", "one", "yes")
    made.torpor("wait", "one")
    found = json.loads(made.torpor("output", "one").stdout)
    assert found["answer"] == "yes"
    assert found["after"] == found["before"]
    assert {found["after"][name] for name in KEPT} == {found["secret"]}
    assert found["ticks"][1] > found["ticks"][0]
    assert (found["heard"], found["streams"]) == (["still there"], 1)
    assert found["same_processes"]
    assert found["processes"] >= 5
    assert (found["picture"], found["exit"]) == (PNG, 0)
    assert [event["data"]["mode"] for event in made.events("one") if event["kind"] == "recovery.chosen"] == [
        "boot",
        "restore",
    ]
    made.torpor("down")
    check_nothing_left(made)
