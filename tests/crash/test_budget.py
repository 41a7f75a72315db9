"""kill -9 at each step of a budget's life: a held call is found again, goes on once it fits, and is sent once."""

import signal
import sys
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from tests.crash.witness import check_nothing_left
from tests.stage import PATIENCE_SECONDS, Stage, stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]

AGENT = """
import json, os, urllib.request
for turn in range(3):
    body = {"model": "scripted-large", "max_tokens": 9, "messages": [{"role": "user", "content": f"turn {turn}"}]}
    request = urllib.request.Request(os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=600) as answer:
        print(json.load(answer)["content"][0]["text"], flush=True)
"""
TOO_LITTLE, ENOUGH = "0.001", "0.02"
"""A call of the agent's may cost 0.0044 dollars; it costs a twentieth of that."""


@pytest.fixture
def limited(scratch: Path, runsc: Path) -> Iterator[Stage]:
    with stage(scratch, runsc, ["--script", "plain"]) as made:
        made.home.mkdir(mode=0o700)
        (made.home / "config.toml").write_text('[prices."scripted-*"]\ninput = "1"\noutput = "10"\n')
        (made.project / "ask.py").write_text(AGENT)
        yield made


def run(budget: str) -> tuple[str, ...]:
    return ("run", "--name", "one", "--budget", budget, "--", sys.executable, "ask.py")


def check(made: Stage, *, torn: int = 0) -> None:
    """Every call was sent once, or once more for its torn attempt, within the limit of each moment."""
    events = made.events("one")
    sent = Counter(event["call"] for event in events if event["kind"] == "call.sent")
    assert len(sent) == 3
    assert sum(sent.values()) == 3 + torn
    asked = sum(line["event"] == "start" for line in made.witness)
    assert 3 <= asked <= 3 + torn
    limit, taken = Decimal(0), dict[str, Decimal]()
    for event in events:
        data, key = event["data"], f"{event['call']} {event['data'].get('attempt')}"
        match event["kind"]:
            case "session.created":
                limit = Decimal(data["budget"])
            case "budget.changed":
                limit = Decimal(data["to"])
            case "call.sent":
                taken[key] = Decimal(data["reserved"])
            case "call.completed":
                taken[key] = Decimal(data["cost"])
            case _:
                pass
        assert sum(taken.values()) <= limit, event
    made.torpor("log", "one", "--verify")
    [report] = made.rows("cost", "one")
    [state] = made.rows("budget", "one")
    assert Decimal(report["cost"]) == sum(taken.values()) or torn
    assert Decimal(state["spent"]) == sum(taken.values())
    assert (state["reserved"], state["waits_on"]) == ("0", [])
    assert made.torpor("output", "one").stdout.count("Hello") == 3
    check_nothing_left(made)


def wait_held(made: Stage, count: int = 1) -> None:
    log = made.follow("one")
    log.wait("waitpoint.created", count)
    log.close()


def state_of(made: Stage) -> tuple[str, int]:
    """The session's status, and how many calls its budget holds."""
    [shown] = made.rows("show", "one")
    return shown["status"], len(shown["waits_on"])


def test_a_node_that_dies_as_it_holds_a_call_leaves_it_held_and_the_next_sends_it_once(limited: Stage) -> None:
    node = limited.node(*run(TOO_LITTLE), TORPOR_CRASH_POINT="waitpoint.created")
    assert node.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    assert state_of(limited) == ("waiting", 1)
    assert limited.witness == []
    resumed = limited.node("resume", "one")
    log = limited.follow("one")
    log.wait("recovery.chosen", 2)
    limited.torpor("budget", "one", "--add", ENOUGH)
    assert resumed.wait(PATIENCE_SECONDS) == 0
    log.close()
    check(limited)


def test_a_held_call_outlives_its_node_and_its_sandbox(limited: Stage) -> None:
    node = limited.node(*run(TOO_LITTLE))
    log = limited.follow("one")
    log.wait("waitpoint.created")
    log.wait("checkpoint.committed", 2)
    node.kill()
    node.wait()
    limited.kill_sandbox()
    resumed = limited.node("resume", "one")
    log.wait("session.status", 5)  # running, waiting, recovering, running, waiting
    assert state_of(limited) == ("waiting", 1)
    assert limited.witness == []
    shown = limited.torpor("show", "one").stdout
    assert "torpor budget one --add" in shown
    limited.torpor("budget", "one", "--add", ENOUGH)
    assert resumed.wait(PATIENCE_SECONDS) == 0
    log.close()
    check(limited)


@pytest.mark.parametrize("who", ["node", "command"])
def test_a_raise_counts_once_it_is_written_whoever_dies_then(limited: Stage, who: str) -> None:
    dying = {"TORPOR_CRASH_POINT": "waitpoint.resolved"}
    node = limited.node(*run(TOO_LITTLE), **(dying if who == "node" else {}))
    wait_held(limited)
    if who == "command":
        node.kill()
        node.wait()
    raised = limited.torpor("budget", "one", "--add", ENOUGH, check=False, **(dying if who == "command" else {}))
    assert raised.returncode != 0
    node.wait(PATIENCE_SECONDS)
    assert state_of(limited) == ("running", 0)
    assert limited.witness == []
    assert limited.torpor("resume", "one").returncode == 0
    check(limited)


@pytest.mark.parametrize("point", ["call.intended", "call.sent", "call.completed"])
def test_a_reservation_outlives_the_node_that_made_it(limited: Stage, point: str) -> None:
    node = limited.node(*run(ENOUGH), TORPOR_CRASH_POINT=f"{point}:2")
    assert node.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    assert limited.torpor("resume", "one").returncode == 0
    check(limited, torn=int(point == "call.sent"))


def test_a_session_that_waits_can_sleep_and_have_its_budget_raised_meanwhile(limited: Stage) -> None:
    node = limited.node(*run(TOO_LITTLE))
    wait_held(limited)
    limited.torpor("stop", "one")
    assert node.wait(PATIENCE_SECONDS) == 79
    assert state_of(limited) == ("asleep", 1)
    limited.torpor("budget", "one", "--add", ENOUGH)
    assert state_of(limited) == ("asleep", 0)
    assert limited.torpor("resume", "one").returncode == 0
    check(limited)
