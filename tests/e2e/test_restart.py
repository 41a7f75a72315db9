"""An agent that exits with an error begins again before the turn that failed, in a real sandbox."""

import signal
import sys
from collections import Counter

import pytest
from tests.crash.witness import check_nothing_left
from tests.stage import Stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]

AGENT = """
import json, sys, urllib.request
from torpor import agent

def model(text):
    body = {"model": "scripted-1", "messages": [{"role": "user", "content": text}]}
    request = urllib.request.Request(
        "http://127.0.0.1:4100/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]

model("first")
agent.send("between")
said = model("second")
agent.send("in the turn")
print("good" if "attempt 3" in said else "bad", flush=True)
sys.exit(0 if "attempt 3" in said else 3)
"""


def check_the_model_was_asked_anew(stage: Stage, asked: int) -> None:
    sendings = Counter(row["digest"] for row in stage.witness if row["event"] == "start")
    assert sorted(sendings.values()) == [1, asked]
    assert [row["text"] for row in stage.rows("tail", "one")] == ["between", "in the turn"]
    stage.torpor("log", "one", "--verify")
    check_nothing_left(stage)


def test_it_begins_again_until_the_model_says_something_better(quick: Stage) -> None:
    (quick.project / "agent.py").write_text(AGENT)
    node = quick.node("run", "--name", "one", "--restart", "on-failure", "--", sys.executable, "agent.py")
    assert node.wait(300) == 0
    assert quick.torpor("output", "one").stdout == "good\n"
    [shown] = quick.rows("show", "one")
    assert (shown["status"], shown["restarts"], shown["restarts_max"]) == ("succeeded", 2, 3)
    restarts = [event["data"] for event in quick.events("one") if event["kind"] == "agent.restarted"]
    assert [(data["exit_status"], data["restart"]) for data in restarts] == [(3, 1), (3, 2)]
    assert "restart 2 of 3" in quick.torpor("log", "one").stdout
    check_the_model_was_asked_anew(quick, 3)


def test_it_fails_when_it_got_no_further(quick: Stage) -> None:
    (quick.project / "agent.py").write_text(AGENT)
    node = quick.node("run", "--name", "one", "--restart", "on-failure:1", "--", sys.executable, "agent.py")
    assert node.wait(300) == 3
    assert "not restarted: it failed again after 1 restarts" in (quick.directory / "node.log").read_text()
    assert quick.rows("ls")[0]["status"] == "failed"
    check_the_model_was_asked_anew(quick, 2)


@pytest.mark.parametrize("both", [False, True], ids=["node", "node and sandbox"])
def test_a_node_that_dies_when_it_has_decided_leaves_the_decision(quick: Stage, both: bool) -> None:
    (quick.project / "agent.py").write_text(AGENT)
    command = ("run", "--name", "one", "--restart", "on-failure:2", "--", sys.executable, "agent.py")
    node = quick.node(*command, TORPOR_CRASH_POINT="restart.decided")
    assert node.wait(300) == -signal.SIGKILL
    if both:
        quick.kill_sandbox()
    assert quick.node("resume", "one").wait(300) == 0
    assert quick.rows("show", "one")[0]["restarts"] == 2
    check_the_model_was_asked_anew(quick, 3)
