"""kill -9 at each step of a fork and of a rewind: all children or none, one answer, never the branch that was left."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.crash.witness import check_nothing_left
from tests.stage import PATIENCE_SECONDS, Stage, stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(900)]

TURNS = 4
AGENT = """
import json, os, urllib.request
for turn in range(1, 5):
    body = {"model": "scripted-large", "max_tokens": 9, "messages": [{"role": "user", "content": f"turn {turn}"}]}
    request = urllib.request.Request(os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=600) as answer:
        print(turn, json.load(answer)["content"][0]["text"], flush=True)
"""


@pytest.fixture
def asking(scratch: Path, runsc: Path) -> Iterator[Stage]:
    """An agent of four turns."""
    with stage(scratch, runsc, ["--script", "plain", "--first-byte-seconds", "2.5"]) as made:
        (made.project / "agent.py").write_text(AGENT)
        yield made


@pytest.fixture
def waiting(scratch: Path, runsc: Path) -> Iterator[Stage]:
    """The same with a model that takes so long to begin that a fork is made meanwhile."""
    with stage(scratch, runsc, ["--script", "plain", "--first-byte-seconds", "3"]) as made:
        (made.project / "agent.py").write_text(AGENT)
        yield made


def begin(made: Stage, turn: int) -> None:
    """Run the session until a turn is under way and has its checkpoint, and kill all of it there."""
    node = made.node("run", "--name", "one", "--", sys.executable, "agent.py")
    log = made.follow("one")
    log.wait("checkpoint.committed", 1 + turn)
    node.kill()
    node.wait()
    made.kill_sandbox()
    log.close()


def resume(made: Stage, session: str, **variables: str) -> int:
    return made.node("resume", session, **variables).wait(PATIENCE_SECONDS)


def asked(made: Stage) -> int:
    """How many requests reached the model."""
    return sum(line["event"] == "start" for line in made.witness)


def of_kind(made: Stage, session: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in made.events(session) if event["kind"] == kind]


def answered(made: Stage) -> int:
    """How many answers the session had when it was killed."""
    return len(of_kind(made, "one", "call.completed"))


def turns_of(made: Stage, session: str) -> list[int]:
    return [int(line.split()[0]) for line in made.torpor("output", session).stdout.splitlines()]


@pytest.mark.parametrize("point", ["snapshot.manifest_written:2", "fork.stored", "fork.committed"])
def test_a_fork_that_dies_has_made_all_children_or_none(asking: Stage, point: str) -> None:
    begin(asking, 2)
    died = asking.torpor("fork", "one", "--at", "turn:2", "--count", "3", check=False, TORPOR_CRASH_POINT=point)
    assert died.returncode == -signal.SIGKILL
    children = [row["session"] for row in asking.rows("ls") if row["name"] != "one"]
    assert len(children) == (3 if point == "fork.committed" else 0)
    asking.torpor("collect", "--grace", "0")
    assert asking.torpor("verify", "--read-data").returncode == 0
    if not children:
        children = [row["session"] for row in asking.rows("fork", "one", "--at", "turn:2", "--count", "3")]
    before, cut_short = asked(asking), answered(asking) < 2
    assert [resume(asking, child) for child in children[:2]] == [0, 0]
    # If the parent's second answer was cut short with its node, each child asks for it; and for two more.
    assert asked(asking) == before + 2 * (2 + cut_short)
    assert [turns_of(asking, child) for child in children[:2]] == [[2, 3, 4]] * 2
    assert resume(asking, "one") == 0
    assert turns_of(asking, "one") == [1, 2, 3, 4]
    for session in ("one", *children):
        asking.torpor("log", session, "--verify")
    check_nothing_left(asking)


@pytest.mark.parametrize("point", ["call.delivered", "checkpoint.committed"])
def test_a_child_that_dies_has_its_parents_answer_once_and_asks_nobody_for_it(asking: Stage, point: str) -> None:
    begin(asking, 2)
    assert resume(asking, "one") == 0
    [child] = asking.rows("fork", "one", "--at", "turn:2")
    check_joined(asking, child["session"], point)


def test_a_child_that_dies_with_the_answer_that_it_awaited_has_it_once(waiting: Stage) -> None:
    node = waiting.node("run", "--name", "one", "--", sys.executable, "agent.py")
    log = waiting.follow("one")
    log.wait("call.sent", 2)
    [child] = waiting.rows("fork", "one")
    assert [event["kind"] for event in waiting.events(child["session"])].count("call.completed") == 0
    assert node.wait(PATIENCE_SECONDS) == 0
    log.close()
    check_joined(waiting, child["session"], "fork.joined")


def check_joined(made: Stage, session: str, point: str) -> None:
    """A child of the second turn dies at a point and goes on: only the turns behind that cost something."""
    before = asked(made)
    assert resume(made, session, TORPOR_CRASH_POINT=point) == -signal.SIGKILL
    made.kill_sandbox()
    assert resume(made, session) == 0
    joined = [event for event in of_kind(made, session, "call.completed") if "joined" in event["data"]]
    assert len(joined) == 1
    assert asked(made) == before + 2 + len(of_kind(made, session, "call.torn"))
    assert turns_of(made, session) == [2, 3, 4]
    made.torpor("log", session, "--verify")
    check_nothing_left(made)


@pytest.mark.parametrize("point", ["rewind.freed", "rewind.committed"])
def test_a_rewind_that_dies_has_happened_or_not(asking: Stage, point: str) -> None:
    begin(asking, 3)
    died = asking.torpor("rewind", "one", "--to", "turn:2", check=False, TORPOR_CRASH_POINT=point)
    assert died.returncode == -signal.SIGKILL
    rewound = of_kind(asking, "one", "session.rewound")
    assert len(rewound) == (point == "rewind.committed")
    before, left = asked(asking), TURNS - answered(asking)
    assert resume(asking, "one") == 0
    # What was cut short by the first kill is asked for again; after a rewind it is turn 2 and what comes after it.
    assert asked(asking) == before + (3 if rewound else left)
    assert turns_of(asking, "one") == [1, 2, 3, 4]
    asking.torpor("log", "one", "--verify")
    check_nothing_left(asking)


@pytest.mark.parametrize("point", ["call.sent", "call.completed", "call.delivered"])
def test_no_recovery_after_a_rewind_goes_to_what_it_left(asking: Stage, point: str) -> None:
    begin(asking, 3)
    asking.torpor("rewind", "one", "--to", "turn:2")
    left = {row["number"] for row in asking.rows("checkpoints", "one") if row["left"]}
    assert left
    before = asked(asking)
    assert resume(asking, "one", TORPOR_CRASH_POINT=point) == -signal.SIGKILL
    asking.kill_sandbox()
    assert resume(asking, "one") == 0
    restored = [event["data"]["checkpoint"] for event in of_kind(asking, "one", "incarnation.started")]
    assert not left & set(restored)
    # Turn 2 was asked anew once, whatever came of the node that did it, and the two behind it.
    assert asked(asking) == before + 3
    assert turns_of(asking, "one") == [1, 2, 3, 4]
    asking.torpor("log", "one", "--verify")
    check_nothing_left(asking)


def test_below_a_rewinds_own_checkpoint_the_ladder_gives_no_answer_of_what_was_left(asking: Stage) -> None:
    begin(asking, 4)
    asking.torpor("rewind", "one", "--to", "turn:3")
    [target] = [row for row in asking.rows("checkpoints", "one") if row["reason"] == "rewind"]
    for manifest in (asking.home / "store").rglob(target["snapshot"]):
        manifest.unlink()
    old = {event["seq"]: event for event in asking.events("one")}
    answered = [event["call"] for event in old.values() if event["kind"] == "call.completed"]
    before = asked(asking)
    assert resume(asking, "one") == 0
    # From turn 2's checkpoint: its answer is in the log, those of turns 3 and 4 are asked for anew.
    assert asked(asking) == before + 2
    restored = [event["data"]["checkpoint"] for event in of_kind(asking, "one", "incarnation.started")]
    left = {row["number"] for row in asking.rows("checkpoints", "one") if row["left"]}
    assert left
    assert not left & set(restored)
    used = {event["call"] for event in asking.events("one") if event["seq"] not in old and event["call"] in answered}
    assert used == {answered[1]}
    assert turns_of(asking, "one") == [1, 2, 3, 4]
    asking.torpor("log", "one", "--verify")


def test_a_child_of_a_large_request_has_it_whole_whoever_died_before(asking: Stage) -> None:
    made = asking
    large = AGENT.replace('f"turn {turn}"', '__import__("random").Random(turn).randbytes(1200000).hex()')
    (made.project / "agent.py").write_text(large)
    begin(made, 1)
    died = made.torpor("fork", "one", "--at", "turn:1", check=False, TORPOR_CRASH_POINT="blob.stored")
    assert died.returncode == -signal.SIGKILL
    blobs = list((made.home / "store/blobs").rglob("*_*"))
    made.torpor("collect", "--grace", "0")
    assert len(list((made.home / "store/blobs").rglob("*_*"))) < len(blobs)
    assert len(list((made.home / "sessions").iterdir())) == 1
    [child] = made.rows("fork", "one", "--at", "turn:1")
    made.torpor("rm", "one")
    assert resume(made, child["session"]) == 0
    assert turns_of(made, child["session"]) == [1, 2, 3, 4]
    made.torpor("log", child["session"], "--verify")
    check_nothing_left(made)
