"""Content is erased in the middle of a session's life; everything is killed, and the session goes on to its end."""

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.crash.witness import check_nothing_left, check_order
from tests.stage import Stage, stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(900)]

SECRET = "sk-planted-0123456789"
PATTERN = r"sk-planted-\d+"
TURNS = 6
AGENT = f"""
import json, urllib.request
from openai import OpenAI

def note(text):
    request = urllib.request.Request("http://127.0.0.1:4100/torpor/v1/notes", json.dumps({{"text": text}}).encode())
    return json.load(urllib.request.urlopen(request))

secret, client = open("secret.txt").read(), OpenAI(max_retries=5)
messages = [{{"role": "user", "content": f"The key is {{secret}}. " + "Keep it. " * 100}}]
print("the key is", secret, flush=True)
for turn in range({TURNS}):
    stream = client.chat.completions.create(model="scripted-large", messages=messages, stream=True)
    text = "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)
    messages += [{{"role": "assistant", "content": text}}, {{"role": "user", "content": f"turn {{turn}} is over"}}]
    note(f"turn {{turn}} with {{secret}}")
print(json.dumps({{"turns": len(messages) // 2}}), flush=True)
"""


@pytest.fixture
def told(scratch: Path, runsc: Path) -> Iterator[Stage]:
    """A project whose agent tells the model a secret, and answers that take about two seconds."""
    pace = ["--first-byte-seconds", "0.3", "--chunk-seconds", "0.25"]
    with stage(scratch, runsc, ["--script", "plain", *pace]) as made:
        (made.project / "telling.py").write_text(AGENT)
        (made.project / "secret.txt").write_text(SECRET)
        yield made


def kill_everything(made: Stage, node: subprocess.Popen[str]) -> None:
    node.send_signal(signal.SIGKILL)
    node.wait()
    made.kill_sandbox()


def redact(made: Stage, *what: str) -> dict[str, Any]:
    erased = json.loads(made.torpor("redact", "one", *what, "--yes", "--json").stdout)
    assert "is whole" in made.torpor("log", "one", "--verify").stdout
    return erased


def files_of_the_log(made: Stage) -> bytes:
    return b"".join(path.read_bytes() for path in made.home.glob("torpor.db*"))


def check_attempts(made: Stage, events: list[dict[str, Any]]) -> None:
    """Each model call is sent once, and again only after its node died meanwhile; the model saw no more than that."""
    asking = {event["call"] for event in events if event["kind"] == "call.intended" and event["data"]["is_llm"]}
    sent, torn = (
        Counter(event["call"] for event in events if event["kind"] == kind and event["call"] in asking)
        for kind in ("call.sent", "call.torn")
    )
    assert all(number <= 1 + torn[call] for call, number in sent.items())
    assert sum(line["event"] == "start" for line in made.witness) == sent.total()
    assert all(deaths <= 2 for deaths in torn.values())


def test_a_session_that_was_redacted_and_killed_goes_on_to_its_end(told: Stage) -> None:
    node = told.node("run", "--name", "one", "--", sys.executable, "telling.py")
    log = told.follow("one")
    log.wait("call.answering", 2 * 3)  # The third answer of the model's: every turn has a note as well.
    node.send_signal(signal.SIGKILL)
    node.wait()
    log.close()
    assert told.sandbox_pids(), "the sandbox outlives its node"

    first = next(event for event in told.events("one") if event["kind"] == "call.completed" and event["data"]["usage"])
    assert SECRET in told.torpor("turn", "one", "1", "--raw", "request").stdout
    erased = redact(told, "--pattern", PATTERN)
    assert erased["blocks"] >= 3 and erased["output_pieces"] >= 1
    assert {place.partition(":")[0] for place in erased["places"]} >= {"request", "note", "stdout"}
    assert redact(told, "--block", first["data"]["digest"])["answers"] == 1
    # The workspace's own copy, and images, are not the log's.
    assert SECRET.encode() not in files_of_the_log(told)
    assert told.rows("search", SECRET) == []
    assert told.rows("search", "turn", "with") != []
    told.kill_sandbox()

    completed = sum(event["kind"] == "call.completed" for event in told.events("one"))
    node = told.node("resume", "one")
    log = told.follow("one")
    log.wait("call.completed", completed + 1)
    kill_everything(told, node)
    log.close()

    assert told.node("resume", "one").wait(300) == 0
    events = told.events("one")
    output = told.torpor("output", "one").stdout
    assert output.startswith(f"the key is {'*' * len(SECRET)}\n")
    assert json.loads(output.splitlines()[-1]) == {"turns": TURNS}
    assert [event["data"]["mode"] for event in events if event["kind"] == "recovery.chosen"].count("restore") == 2
    check_order(events)
    check_attempts(told, events)
    verified = told.torpor("log", "one", "--verify").stdout
    assert "is whole" in verified and "were redacted" in verified
    check_nothing_left(told)

    # What the agent told again after that is in the log again, and may be erased again.
    redact(told, "--pattern", PATTERN)
    assert SECRET.encode() not in files_of_the_log(told)
    told.torpor("export", "one", "exported.jsonl")
    told.torpor("rm", "one")
    told.torpor("import", "exported.jsonl")
    assert "is whole" in told.torpor("log", "one", "--verify").stdout
