"""An agent that uses `torpor.agent` in a real sandbox, which is killed in the middle of its waits."""

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
