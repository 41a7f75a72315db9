"""Children of one session in real sandboxes: they join its answer, are somebody of their own, and go their own ways."""

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.crash.witness import check_nothing_left
from tests.stage import PATIENCE_SECONDS, ROOT, SLOWER, Stage, stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(900)]

ASKING = """
import json, os, urllib.request

def ask(text):
    body = {"model": "scripted-large", "max_tokens": 9, "messages": [{"role": "user", "content": text}]}
    request = urllib.request.Request(os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)["content"][0]["text"]
"""
DRAWING = """
import json, os, random, ssl

mine = random.Random(7)
for turn in range(1, 4):
    said = ask(f"turn {turn}: {os.urandom(8).hex()}")
    drawn = {"urandom": os.urandom(8).hex(), "random": random.random(), "openssl": ssl.RAND_bytes(8).hex()}
    print(json.dumps({"turn": turn, "said": said, **drawn, "mine": mine.random()}), flush=True)
"""
SLOW = ["--script", "plain", "--first-byte-seconds", f"{6 * SLOWER:.1f}"]


def snippet(language: str) -> str:
    """What docs/forking.md tells people to use."""
    found = re.search(rf"```{language}\n(.*?)```", (ROOT / "docs/forking.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def slow_model(scratch: Path, runsc: Path) -> Iterator[Stage]:
    """A model that takes three seconds to begin its answer, longer on a busy machine."""
    with stage(scratch, runsc, SLOW) as made:
        yield made


@pytest.fixture
def quick_plain(scratch: Path, runsc: Path) -> Iterator[Stage]:
    """A model that answers at once."""
    with stage(scratch, runsc, ["--script", "plain", "--first-byte-seconds", "0"]) as made:
        yield made


def drawn(made: Stage, session: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in made.torpor("output", session).stdout.splitlines()]


def asked(made: Stage) -> int:
    """How many requests reached the model."""
    return sum(line["event"] == "start" for line in made.witness)


def test_children_of_a_call_in_flight_join_its_answer_and_then_go_their_own_ways(slow_model: Stage) -> None:
    made = slow_model
    (made.project / "agent.py").write_text(snippet("python") + ASKING + DRAWING)
    node = made.node("run", "--name", "one", "--", sys.executable, "agent.py")
    log = made.follow("one")
    log.wait("call.sent", 2)
    children = made.rows("fork", "one", "--count", "3", "--name", "kid")
    assert "call.completed" not in [event["kind"] for event in made.events("one")][-4:], "the call was not in flight"
    nodes = [made.node("resume", child["session"], log=f"{child['session']}.log") for child in children]
    assert [resumed.wait(PATIENCE_SECONDS) for resumed in [node, *nodes]] == [0] * 4
    log.close()

    # Three calls of the parent; each child has the answer of the second from there, and asks the third time itself.
    assert asked(made) == 3 + 3
    told = {name: drawn(made, name) for name in ("one", "kid-1", "kid-2", "kid-3")}
    assert [line["turn"] for line in told["one"]] == [1, 2, 3]
    for name in ("kid-1", "kid-2", "kid-3"):
        assert [line["turn"] for line in told[name]] == [2, 3]
        assert told[name][0]["said"] == told["one"][1]["said"]
        joined = [
            event for event in made.events(name) if event["kind"] == "call.completed" and "joined" in event["data"]
        ]
        assert [event["data"]["cost"] for event in joined] == ["0"]
        made.torpor("log", name, "--verify")
    lives = [told["one"][1], *(told[name][0] for name in ("kid-1", "kid-2", "kid-3"))]
    for drawn_by in ("urandom", "random", "openssl"):
        assert len({line[drawn_by] for line in lives}) == 4, drawn_by
    assert (
        len({line["mine"] for line in lives}) == 1
    )  # What nobody reseeds is the same in all: docs/forking.md says so.
    assert len({told[name][-1]["said"] for name in told}) == 4
    check_nothing_left(made)


def test_children_that_wait_for_their_parents_answer_keep_nobody_from_beginning(quick_plain: Stage) -> None:
    """A daemon that begins one session at a time, and an answer that does not come until its session is killed."""
    made = quick_plain
    made.home.mkdir()
    (made.home / "config.toml").write_text("starts_max = 1\n")
    silent = json.dumps({"fault": "silent", "times": 1}).encode()
    urllib.request.urlopen(f"{made.control}/faults", data=silent).close()
    (made.project / "agent.py").write_text(ASKING + 'print(ask("turn 1"))')
    node = made.node("run", "--name", "one", "--", sys.executable, "agent.py")
    log = made.follow("one")
    log.wait("call.sent")
    log.close()
    made.torpor("up")
    made.rows("fork", "one", "--count", "2", "--name", "kid")
    resumed = [made.node("resume", "--detach", kid, log=f"{kid}.log") for kid in ("kid-1", "kid-2")]
    while (made.home / "daemon.log").read_text().count("waiting for the answer") < 2:
        continue
    made.torpor("run", "--detach", "--name", "other", "--", "true")
    assert made.torpor("wait", "other").returncode == 0
    assert not any(event["kind"] == "call.completed" for event in made.events("one"))
    made.torpor("kill", "one")
    assert node.wait(PATIENCE_SECONDS) == 137
    assert [kid.wait(PATIENCE_SECONDS) for kid in resumed] == [0, 0]
    assert made.torpor("wait", "kid-1", "kid-2").returncode == 0
    made.torpor("down")
    check_nothing_left(made)


NODE_DRAWING = """
const crypto = require("crypto"), fs = require("fs");
(async () => {
  for (let turn = 1; turn <= 2; turn++) {
    const body = {model: "scripted-large", max_tokens: 9, messages: [{role: "user", content: `turn ${turn}`}]};
    const sent = {method: "POST", body: JSON.stringify(body)};
    const answer = await fetch(process.env.ANTHROPIC_BASE_URL + "/v1/messages", sent);
    await answer.json();
    console.log(JSON.stringify({turn, bytes: crypto.randomBytes(8).toString("hex"), uuid: crypto.randomUUID(),
      math: Math.random()}));
  }
})();
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node")
def test_forks_of_a_node_process_draw_different_numbers_with_what_the_docs_give(slow_model: Stage) -> None:
    made = slow_model
    (made.project / "kernel-random.cjs").write_text(snippet("js"))
    (made.project / "agent.cjs").write_text(NODE_DRAWING)
    node = made.node("run", "--name", "one", "--", "node", "--require", "./kernel-random.cjs", "agent.cjs")
    log = made.follow("one")
    log.wait("call.sent")
    made.rows("fork", "one", "--count", "2", "--name", "kid")
    nodes = [made.node("resume", name, log=f"{name}.log") for name in ("kid-1", "kid-2")]
    assert [resumed.wait(PATIENCE_SECONDS) for resumed in [node, *nodes]] == [0] * 3
    log.close()
    first = [drawn(made, name)[0] for name in ("one", "kid-1", "kid-2")]
    for what in ("bytes", "uuid", "math"):
        assert len({line[what] for line in first}) == 3, what


WAITING = """
import urllib.request

def call(path, **body):
    with urllib.request.urlopen("http://127.0.0.1:4100/torpor/v1/" + path, json.dumps(body).encode()) as answer:
        return json.load(answer)

call("send", text="before")
asked = call("ask", question="Which way?", wait=False)["waitpoint"]
call("receive")
call("checkpoint")
answer = call("wait", waitpoints=[asked])["waitpoints"][0]["answer"]
message = call("receive")
number = call("send", text=f"{answer}: {message['text']}")["number"]
told = {}
if os.path.exists("/run/torpor/environment"):
    with open("/run/torpor/environment") as file:
        told = dict(line.split("=", 1) for line in file.read().splitlines())
with open("/run/torpor/incarnation") as file:
    incarnation = int(file.read())
print(json.dumps({"answer": answer, "message": message, "number": number, "way": told.get("WAY"),
    "which": told.get("TORPOR_FORK"), "machine": told.get("TORPOR_MACHINE_ID"), "incarnation": incarnation}))
"""


def test_each_child_is_answered_and_written_to_by_itself_and_needs_no_parent(slow_model: Stage) -> None:
    made = slow_model
    (made.project / "agent.py").write_text(ASKING + WAITING)
    node = made.node("run", "--name", "one", "--", sys.executable, "agent.py")
    log = made.follow("one")
    log.wait("waitpoint.created", 2)
    made.torpor("send", "one", "handled")
    log.wait("checkpoint.committed", 2)
    made.torpor("send", "one", "not handled yet")
    log.wait("waitpoint.created", 2)
    children = made.rows("fork", "one", "--count", "2", "--name", "kid", "--env", "WAY=east", "--message", "hello")
    made.torpor("resolve", "one", "the parent's way")
    assert node.wait(PATIENCE_SECONDS) == 0
    assert drawn(made, "one")[0]["answer"] == "the parent's way"
    log.close()
    made.torpor("rm", "one")
    made.torpor("collect", "--grace", "0")

    for number, child in enumerate(children, 1):
        name = f"kid-{number}"
        [waiting] = made.rows("waitpoints", name)
        assert waiting["question"] == "Which way?"
        assert made.torpor("resolve", name, f"way {number}").returncode == 0
        assert made.node("resume", name).wait(PATIENCE_SECONDS) == 0
        [told] = drawn(made, name)
        assert (told["answer"], told["way"], told["which"]) == (f"way {number}", "east", str(number))
        assert (told["message"]["number"], told["message"]["text"]) == (2, "not handled yet")
        assert told["number"] == 2, "the parent's first message out was number 1"
        assert told["incarnation"] == 2
        assert [row["text"] for row in made.rows("tail", name)] == [f"way {number}: not handled yet"]
        assert child["parent"] not in {row["session"] for row in made.rows("ls")}
        made.torpor("log", name, "--verify")
    assert len({drawn(made, f"kid-{number}")[0]["machine"] for number in (1, 2)}) == 2
    drawing = made.torpor("tree", "kid-1", NO_COLOR="1").stdout
    assert "which is gone" in drawing
    assert "\x1b" not in drawing
    check_nothing_left(made)


def test_what_a_person_sees_of_a_rewind_that_leaves_something_done(slow_model: Stage) -> None:
    made = slow_model
    (made.project / "agent.py").write_text(
        ASKING
        + "import urllib.request\n"
        + WAITING.partition('call("send"')[0].partition("import urllib.request")[2]
        + 'ask("one")\nask("two")\nprint("two", flush=True)\ncall("send", text="done")\n'
        + 'taken = call("receive")["text"]\nask("three")\nprint(taken, flush=True)\n'
    )
    node = made.node("run", "--name", "one", "--", sys.executable, "agent.py")
    log = made.follow("one")
    log.wait("message.sent")
    made.torpor("send", "one", "go on")
    log.wait("call.sent", 5)  # two of models, what was sent out, what was received, and one more of a model
    refused = made.torpor("rewind", "one", "--to", "turn:2", "--json", check=False)
    orphan, error = (json.loads(line) for line in refused.stdout.splitlines())
    assert (refused.returncode, orphan["orphan"], orphan["text"]) == (75, "message", "done")
    assert error["error"]["code"] == "rewind_orphans"
    assert node.poll() is None, "who refuses has stopped nothing"

    [done] = made.rows("rewind", "one", "--to", "turn:2", "--yes")
    assert (done["turn"], done["turns_left"]) == (2, 1)
    assert node.wait(PATIENCE_SECONDS) == 79
    log.close()
    before = asked(made)
    assert made.torpor("output", "one").stdout == ""
    assert made.node("resume", "one").wait(PATIENCE_SECONDS) == 0
    # The second and the third turn were asked anew; the message that was handled on the branch was handled once more.
    assert asked(made) == before + 2
    assert made.torpor("output", "one").stdout == "two\ngo on\n"
    assert [row["text"] for row in made.rows("tail", "one")] == ["done", "done"]
    made.torpor("log", "one", "--verify")
    assert [row["turn"] for row in made.rows("turns", "one")] == [1, 2, 3, 4, 5]
    [root, branch] = made.rows("tree", "one")
    assert (root["kind"], branch["kind"], branch["turns"], branch["to_turn"]) == ("session", "branch", 1, 2)

    # What was left goes on as a fork, with the answer that it had, or that it asks for itself.
    [tip] = made.rows("fork", "one", "--at", str(branch["tip"]))
    assert made.node("resume", tip["session"]).wait(PATIENCE_SECONDS) == 0
    assert made.torpor("output", tip["session"]).stdout == "go on\n"
    check_nothing_left(made)


def test_another_model_is_asked_in_a_fork_that_can_be_resumed(quick: Stage) -> None:
    made = quick
    assert made.torpor("run", "--name", "one", "--", sys.executable, "agent.py").returncode == 0
    before = asked(made)
    [done] = made.rows("turn", "one", "3", "--rerun", "--model", "scripted-small")
    assert asked(made) == before + 1
    assert (made.witness[-2]["model"], done["old"]["model"], done["new"]["model"]) == (
        *("scripted-small", "scripted-large", "scripted-small"),
    )
    assert done["old"]["request"]["messages"] == done["new"]["request"]["messages"]
    assert done["new"]["response"]["message"] != done["old"]["response"]["message"]
    assert made.node("resume", done["session"]).wait(PATIENCE_SECONDS) == 0
    text = done["new"]["response"]["message"]["parts"][0]["text"]
    # Its output begins there, or before: at a turn that has a checkpoint of its own.
    assert f"[model] {text}" in made.torpor("output", done["session"]).stdout
    made.torpor("log", done["session"], "--verify")
    refused = made.torpor("turn", "one", "3", "--rerun", "--json", check=False)
    assert json.loads(refused.stdout)["error"]["code"] == "rerun_without_model"


def test_the_docs_shell_hook_reads_what_init_writes(tmp_path: Path) -> None:
    told = tmp_path / "environment"
    told.write_text("TORPOR_FORK=1\nTORPOR_MACHINE_ID=0123\n")
    text = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/forking.md").read_text(), re.DOTALL)[-1]
    hook = text.replace("/run/torpor/environment", str(told)).replace("/etc/machine-id", str(tmp_path / "id"))
    subprocess.run(["sh", "-c", hook], check=True)
    assert (tmp_path / "id").read_text() == "0123\n"


def test_a_turn_without_a_checkpoint_of_its_own_is_reached_through_the_log(quick_plain: Stage) -> None:
    made = quick_plain
    (made.project / "agent.py").write_text(ASKING + 'for turn in range(1, 5):\n    print(turn, ask(f"turn {turn}"))\n')
    share = ("run", "--checkpoint-share", "0.001%", "--name", "one")
    assert made.torpor(*share, "--", sys.executable, "agent.py").returncode == 0
    points = made.rows("checkpoints", "one")
    assert [point["reason"] for point in points] == ["start", "call", "exit"]
    said = made.torpor("output", "one").stdout
    before = asked(made)

    # The first turn has a checkpoint. Of the third the child has every answer; the fourth it asks for itself.
    [child] = made.rows("fork", "one", "--at", "turn:3", "--name", "kid")
    assert child["checkpoint"] == 1
    assert made.node("resume", "kid").wait(PATIENCE_SECONDS) == 0
    assert asked(made) == before + 1
    told = made.torpor("output", "kid").stdout.splitlines()
    assert told[:3] == said.splitlines()[:3]
    assert told[3] != said.splitlines()[3]
    assert [event["kind"] for event in made.events("kid")].count("call.repeated") == 2
    assert "call.diverged" not in [event["kind"] for event in made.events("kid")]
    made.torpor("log", "kid", "--verify")

    # Asked anew is only the turn that is meant; what comes after it is new anyway.
    made.rows("fork", "one", "--at", "turn:3", "--name", "other", "--resample")
    assert made.node("resume", "other").wait(PATIENCE_SECONDS) == 0
    assert asked(made) == before + 1 + 2
    told = made.torpor("output", "other").stdout.splitlines()
    assert [line == old for line, old in zip(told, said.splitlines(), strict=True)] == [True, True, False, False]
    made.torpor("log", "other", "--verify")


def test_a_child_can_be_booted_with_the_files_that_it_began_with(quick_plain: Stage) -> None:
    made = quick_plain
    (made.project / "agent.py").write_text(
        ASKING
        + "import os\nprint(os.path.exists('made'), os.environ.get('WAY'))\n"
        + "open('made', 'w').close()\nask('one')\nask('two')\n"
    )
    assert made.torpor("run", "--name", "one", "--", sys.executable, "agent.py").returncode == 0
    made.rows("fork", "one", "--at", "turn:2", "--name", "kid", "--env", "WAY=east")
    assert made.node("resume", "--boot", "kid").wait(PATIENCE_SECONDS) == 0
    assert made.torpor("output", "kid").stdout == "True east\n"
    made.torpor("log", "kid", "--verify")


def test_who_runs_the_parent_runs_its_children_and_one_that_was_taken_back(slow_model: Stage) -> None:
    made = slow_model
    (made.project / "agent.py").write_text(ASKING + 'for turn in range(1, 7):\n    print(turn, ask(f"turn {turn}"))\n')
    made.torpor("run", "-d", "--name", "one", "--", sys.executable, "agent.py")
    log = made.follow("one")
    log.wait("call.sent", 2)
    made.torpor("rewind", "one", "--to", "turn:1")
    log.wait("call.sent", 4)
    made.rows("fork", "one", "--count", "2", "--name", "kid")
    made.rows("fork", "one", "--name", "left", "--asleep")
    log.wait("agent.exited")
    log.close()
    for kid in ("kid-1", "kid-2"):
        followed = made.follow(kid)
        followed.wait("agent.exited")
        followed.close()
    states = {row["name"]: row["status"] for row in made.rows("ls")}
    assert states == {"one": "succeeded", "kid-1": "succeeded", "kid-2": "succeeded", "left": "asleep"}
    for name in states:
        made.torpor("log", name, "--verify")


def test_children_of_a_sleeper_sleep_on_and_each_is_woken_by_its_own_answer(quick_plain: Stage) -> None:
    made = quick_plain
    (made.project / "agent.py").write_text(
        "import json, urllib.request\n"
        'asked = json.dumps({"question": "Which way?"}).encode()\n'
        'with urllib.request.urlopen("http://127.0.0.1:4100/torpor/v1/ask", asked) as answer:\n'
        '    print(json.load(answer)["answer"], flush=True)\n'
    )
    made.torpor("run", "-d", "--name", "one", "--", sys.executable, "agent.py")
    log = made.follow("one")
    log.wait("session.status", 4)  # running, waiting, hibernating, asleep
    assert made.rows("ls")[0]["status"] == "asleep"
    log.close()
    made.rows("fork", "one", "--count", "2", "--name", "kid")
    made.torpor("resolve", "kid-1", "east")
    followed = made.follow("kid-1")
    followed.wait("agent.exited")
    followed.close()
    states = {row["name"]: row["status"] for row in made.rows("ls")}
    assert states == {"one": "asleep", "kid-1": "succeeded", "kid-2": "asleep"}
    assert made.torpor("output", "kid-1").stdout == "east\n"
    made.torpor("log", "kid-1", "--verify")
