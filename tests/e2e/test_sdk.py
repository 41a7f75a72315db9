"""An agent that uses `torpor.agent` in a real sandbox, which is killed in the middle of its waits."""

import json
import signal
import sys

import pytest
from tests.crash.witness import check_nothing_left
from tests.stage import Stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]

AGENT = """
import os
import random
from torpor import agent

lives = []

@agent.after_restore
def fails(restored):
    raise ValueError("this hook fails")

@agent.after_restore
def note(restored):
    lives.append(restored.incarnation)

agent.checkpoint()
drawn = agent.effect("draw", lambda: os.urandom(8).hex())
agent.send(drawn)
answer = agent.ask("Deploy?", ["yes", "no"])
at_answer = list(lives)
agent.checkpoint()
agent.sleep(30 * 86400)
print(answer, at_answer, lives, drawn, agent.session()["incarnation"])
"""


def test_a_kill_in_the_middle_of_a_wait_changes_nothing_and_hooks_run_first(quick: Stage) -> None:
    (quick.project / "agent.py").write_text(AGENT)
    node = quick.node("run", "--name", "one", "--", sys.executable, "agent.py")
    log = quick.follow("one")
    log.wait("waitpoint.created")
    quick.kill_sandbox()
    log.wait("recovery.chosen", 2)
    log.wait("call.repeated", 3)  # The effect's, the message's and the question.
    assert quick.torpor("resolve", "one", "YES").stdout.startswith("resolved wp_")
    log.wait("waitpoint.created", 2)

    node.kill()
    assert node.wait(60) == -signal.SIGKILL
    quick.kill_sandbox()
    log.close()
    assert [row["kind"] for row in quick.rows("waitpoints")] == ["timer"]
    quick.torpor("resolve", "one")
    node = quick.node("resume", "one")
    assert node.wait(300) == 0

    [sent] = [row["text"] for row in quick.rows("tail", "one")]
    assert quick.torpor("output", "one").stdout == f"yes [2] [2, 3] {sent} 3\n"
    assert "this hook fails" in quick.torpor("output", "one", "--stderr").stdout
    kinds = [event["kind"] for event in quick.events("one")]
    assert "call.diverged" not in kinds
    assert kinds.count("waitpoint.created") == 2
    quick.torpor("log", "one", "--verify")
    check_nothing_left(quick)


PREPARING = """
import asyncio, json, os, urllib.request
from torpor import agent

phase, ran = "", []

def ask_a_model():
    asked = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Well?"}]}).encode()
    fields = {"content-type": "application/json", "authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    with urllib.request.urlopen(
        urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", asked, fields)
    ) as answer:
        answer.read()

@agent.before_checkpoint
def fails():
    raise ValueError("this hook fails")

@agent.before_checkpoint
def note():
    ran.append(phase)

async def main():
    global phase

    @agent.aio.before_checkpoint
    async def note_too():
        await asyncio.sleep(0)
        ran.append("on the loop")

    phase = "asked for"
    await agent.aio.checkpoint()
    phase = "a turn"
    await asyncio.to_thread(ask_a_model)
    phase = "waiting"
    await agent.aio.ask("Deploy?")
    print(json.dumps(ran))

asyncio.run(main())
"""


def test_hooks_run_before_what_somebody_asks_for_and_not_before_a_turns_checkpoint(quick: Stage) -> None:
    (quick.project / "agent.py").write_text(PREPARING)
    quick.torpor("run", "-d", "--name", "one", "--", sys.executable, "agent.py")
    log = quick.follow("one")
    log.wait("waitpoint.created")
    quick.torpor("checkpoint", "one")
    quick.torpor("hibernate", "one")
    quick.torpor("resolve", "one", "yes")
    log.wait("agent.exited")
    log.close()
    told = quick.torpor("output", "one")
    asked_for, *waiting = [phase for phase in json.loads(told.stdout) if phase != "on the loop"]
    assert (asked_for, waiting) == ("asked for", ["waiting", "waiting"])
    assert json.loads(told.stdout).count("on the loop") == 3
    assert "this hook fails" in quick.torpor("output", "one", "--stderr").stdout
    reasons = [event["data"]["reason"] for event in quick.events("one") if event["kind"] == "checkpoint.committed"]
    assert sorted(reasons) == ["agent", "call", "exit", "hibernate", "manual", "start"]
    quick.torpor("down")
    check_nothing_left(quick)
