"""The agent asks Torpor itself, in a real sandbox: a checkpoint, a note, who it is; over the death of everything."""

import json
import signal
import sys

import pytest
from tests.crash.witness import check_nothing_left
from tests.stage import Stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]

AGENT = """
import json, pathlib, time, urllib.request

def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen("http://127.0.0.1:4100/torpor/v1/" + path, data) as answer:
        return json.load(answer)

answers = [ask("checkpoint", {}), ask("notes", {"text": "after the checkpoint"})]
before = ask("session")
while pathlib.Path("/run/torpor/incarnation").read_text().strip() == "1":
    time.sleep(0.05)
print(json.dumps({"answers": answers, "before": before, "then": ask("session"), "now": ask("session")}))
"""


def run_agent(stage: Stage, **variables: str) -> None:
    (stage.project / "asking.py").write_text(AGENT)
    node = stage.node("run", "--name", "one", "--", sys.executable, "asking.py", **variables)
    log = stage.follow("one")
    if variables:
        assert node.wait(300) == -signal.SIGKILL
        log.close()
        stage.kill_sandbox()
        node = stage.node("resume", "one")
        log = stage.follow("one")
    log.wait("note.added")
    log.wait("call.delivered", 3)
    log.close()
    if not variables:
        stage.kill_sandbox()
    assert node.wait(300) == 0


@pytest.mark.parametrize("killed_at", [None, "checkpoint.committed", "checkpoint.stored"])
def test_an_agent_gets_its_checkpoint_once_and_goes_on_from_it(quick: Stage, killed_at: str | None) -> None:
    run_agent(quick, **({"TORPOR_CRASH_POINT": f"{killed_at}:1"} if killed_at else {}))
    told = json.loads(quick.torpor("output", "one").stdout)
    events = quick.events("one")
    points = [point for point in quick.rows("checkpoints", "one") if point["reason"] == "agent"]
    assert len(points) == 1
    assert told["answers"][0]["checkpoint"] == points[0]["number"]
    assert [event["text"] for event in events if event["kind"] == "note.added"] == ["after the checkpoint"]
    assert told["now"]["incarnation"] == 2
    # Nothing was there to restore when the commit was cut off: the second life is a boot, which has not slept.
    assert (told["now"]["slept_for"] > 0) == (killed_at != "checkpoint.stored")
    if killed_at is None:
        assert told["before"]["incarnation"] == 1
    assert not [event for event in events if event["kind"] == "call.diverged"]
    quick.torpor("log", "one", "--verify")
    check_nothing_left(quick)


SHELL_AGENT = """
set -e
torpor-guest whoami
torpor-guest note "written from a shell"
torpor-guest checkpoint
torpor-guest ask "Deploy?" --choices yes,no
torpor-guest sleep 0.1
torpor-guest receive
torpor-guest receive --timeout 0.1 || test $? -eq 3
torpor-guest send "deployed"
"""


def test_a_shell_script_asks_and_is_answered_through_torpor_guest(quick: Stage) -> None:
    (quick.project / "asking.sh").write_text(SHELL_AGENT)
    node = quick.node("run", "--name", "one", "--", "bash", "asking.sh")
    log = quick.follow("one")
    log.wait("waitpoint.created")
    quick.torpor("send", "one", "go to the west")
    (quick.project / "why.md").write_text("it is tested")
    assert quick.torpor("resolve", "one", "yes", "--file", str(quick.project / "why.md")).returncode == 0
    assert node.wait(300) == 0
    log.close()
    events = quick.events("one")
    session, _, incarnation, *_, number, answer, message = quick.torpor("output", "one").stdout.splitlines()
    assert (session, incarnation) == (f"session: {quick.rows('show', 'one')[0]['session']}", "incarnation: 1")
    assert (answer, message) == ("yes", "go to the west")
    assert [row["text"] for row in quick.rows("tail", "one")] == ["deployed"]
    assert "yes (why.md)" in quick.torpor("log", "one").stdout
    assert [event["text"] for event in events if event["kind"] == "note.added"] == ["written from a shell"]
    assert [str(point["number"]) for point in quick.rows("checkpoints", "one") if point["reason"] == "agent"] == [
        number
    ]
    check_nothing_left(quick)
