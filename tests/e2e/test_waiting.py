"""An agent that asks a person, takes messages and sends some out, in a real sandbox, over the death of everything."""

import json
import signal
import sys

import pytest
from tests.crash.witness import check_nothing_left
from tests.stage import Stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]

AGENT = """
import json, urllib.request

def call(path, **body):
    with urllib.request.urlopen("http://127.0.0.1:4100/torpor/v1/" + path, json.dumps(body).encode()) as answer:
        return json.load(answer)

call("checkpoint")
answer = call("ask", question="Deploy?", choices=["yes", "no"])["answer"]
message = call("receive")
call("send", text=f"{answer}: {message['text']}")
print(answer, message["number"])
"""


def test_what_a_person_says_while_everything_is_dead_is_found_and_counts_once(quick: Stage) -> None:
    (quick.project / "asking.py").write_text(AGENT)
    node = quick.node("run", "--name", "one", "--", sys.executable, "asking.py")
    log = quick.follow("one")
    log.wait("waitpoint.created")
    node.kill()
    assert node.wait(60) == -signal.SIGKILL
    quick.kill_sandbox()
    log.close()

    [waiting] = quick.rows("waitpoints")
    assert (waiting["kind"], waiting["question"], waiting["choices"]) == ("ask", "Deploy?", "yes, no")
    refused = quick.torpor("resolve", "one", "maybe", "--json", check=False)
    assert (refused.returncode, json.loads(refused.stdout)["error"]["code"]) == (64, "answer_not_a_choice")
    killed = quick.torpor("resolve", "one", "yes", check=False, TORPOR_CRASH_POINT="waitpoint.resolved")
    assert killed.returncode == -signal.SIGKILL
    again = quick.torpor("resolve", "one", "no", "--json", check=False)
    assert json.loads(again.stdout)["error"]["code"] == "nothing_to_resolve"
    assert quick.torpor("send", "one", "first", check=False, TORPOR_CRASH_POINT="message.received").returncode < 0

    node = quick.node("resume", "one")
    assert node.wait(300) == 0
    assert quick.torpor("output", "one").stdout == "yes 1\n"
    assert [row["text"] for row in quick.rows("tail", "one")] == ["yes: first"]
    events = quick.events("one")
    assert [event["kind"] for event in events].count("waitpoint.resolved") == 1
    assert [event["text"] for event in events if event["kind"] == "message.received"] == ["first"]
    quick.torpor("log", "one", "--verify")
    ended = quick.torpor("send", "one", "too late", "--json", check=False)
    assert json.loads(ended.stdout)["error"]["code"] == "session_ended"
    check_nothing_left(quick)


def test_a_running_session_is_told_at_once_and_says_what_it_asks(quick: Stage) -> None:
    (quick.project / "asking.py").write_text(AGENT)
    node = quick.node("run", "--name", "one", "--", sys.executable, "asking.py")
    log = quick.follow("one")
    log.wait("waitpoint.created")
    assert "held" not in quick.torpor("budget", "one").stdout
    assert quick.torpor("resolve", "one", "NO").stdout.startswith("resolved wp_")
    log.wait("waitpoint.created", 2)
    assert quick.rows("ls")[0]["status"] == "waiting"
    assert quick.torpor("send", "one", "hello").stdout == "message 1 is in the inbox\n"
    assert node.wait(300) == 0
    assert quick.torpor("tail", "one").stdout == "no: hello\n"
    assert "the agent asks: Deploy? (yes, no)" in (quick.directory / "node.log").read_text()
    log.close()
    quick.torpor("export", "one", "one.jsonl")
    quick.torpor("rm", "one")
    quick.torpor("import", "one.jsonl")
    assert quick.torpor("tail", "one").stdout == "no: hello\n"
