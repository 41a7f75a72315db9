"""An agent that takes another path after its restore, as a person sees it: the session waits, goes on, or fails."""

import json
import sys

import pytest
from tests.crash.witness import check_nothing_left
from tests.stage import Stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]

AGENT = """
import json, pathlib, time, urllib.request

def ask(path, body):
    with urllib.request.urlopen("http://127.0.0.1:4100/torpor/v1/" + path, json.dumps(body).encode()) as answer:
        return json.load(answer)

ask("checkpoint", {})
life = pathlib.Path("/run/torpor/incarnation").read_text().strip()
ask("notes", {"text": "in life " + life})
print("noted in life", life, flush=True)
while pathlib.Path("/run/torpor/incarnation").read_text().strip() == "1":
    time.sleep(0.05)
"""


@pytest.mark.parametrize("policy", ["ask", "fail"])
def test_another_path_waits_for_a_person_or_ends_the_session(quick: Stage, policy: str) -> None:
    (quick.project / "wandering.py").write_text(AGENT)
    command = ("run", "--name", "one", "--on-divergence", policy, "--", sys.executable, "wandering.py")
    node = quick.node(*command)
    log = quick.follow("one")
    log.wait("note.added")
    log.wait("call.delivered", 2)
    quick.kill_sandbox()
    if policy == "ask":
        number = 1
        while log.wait("session.status", number)["data"]["to"] != "waiting":
            number += 1
        assert quick.rows("show", "one")[0]["status"] == "waiting"
        quick.torpor("resume", "--continue", "one")
    log.close()
    assert node.wait(300) == (0 if policy == "ask" else 75)
    events = quick.events("one")
    notes = [event["text"] for event in events if event["kind"] == "note.added"]
    [left] = [event["data"] for event in events if event["kind"] == "call.diverged"]
    assert (left["policy"], len(left["pending"])) == (policy, 1)
    assert notes == ["in life 1", "in life 2"][: 2 if policy == "ask" else 1]
    assert quick.rows("ls")[0]["status"] == ("succeeded" if policy == "ask" else "failed")
    assert json.loads(quick.torpor("show", "one", "--json").stdout)["session"]
    check_nothing_left(quick)
