"""Random kills of the real thing: node, sandbox or both, at random times and at every named crash point.

`make test-crash` kills 200 times; the suite's own run is a short one. The choices follow from --crash-seed.
"""

import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.crash.witness import check_session
from tests.stage import PATIENCE_SECONDS, Stage, stage

from torpor.core.crash import CRASH_POINTS

TURNS = 20
KILLS_PER_SESSION = 10
UNTOUCHED = {
    *("backend", "blob", "child", "chunks", "collect", "divergence", "fork", "hibernate", "import", "keys", "memory"),
    *("redaction", "repack", "restart", "retention", "rewind", "session", "store", "waitpoint", "wake"),
}
NODE_POINTS = [
    point
    for point in CRASH_POINTS
    # The model of these sessions refuses nothing, nobody stops them, they have no budget, which would keep a call's
    # intent and its sending apart, no policy minds another path, their store is a directory, nothing in them is large,
    # nothing is erased, forgotten or collected, nobody rotates keys, and their turns are neither skipped nor overtaken:
    # other tests have those.
    if point.partition(".")[0] not in UNTOUCHED
    and point not in {"call.intended", "call.retried", "checkpoint.skipped", "checkpoint.overtaken"}
]
PACE = ["--turns", str(TURNS), "--first-byte-seconds", "0.15", "--chunk-seconds", "0.02"]


class Plan:
    """What will be killed, and when; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._points: list[str] = []
        self.counted: Counter[str] = Counter()

    def next(self) -> tuple[str, str]:
        """(what to kill, crash point): half of the kills are at a named point, which kills the node itself."""
        if self._random.random() < 0.5:
            if not self._points:
                self._points = self._random.sample(NODE_POINTS, len(NODE_POINTS))
            point = self._points.pop()
            return "point", f"{point}:{1 if point == 'exit.committed' else self._random.randint(1, 3)}"
        return self._random.choice(["node", "sandbox", "both"]), ""

    def seconds(self) -> float:
        return self._random.uniform(0.1, 5.0)


@pytest.fixture
def session_stage(scratch: Path, runsc: Path) -> Iterator[Stage]:
    with stage(scratch, runsc, PACE) as made:
        yield made


@pytest.mark.runsc
@pytest.mark.timeout(5400)
def test_no_kill_loses_anything(runsc: Path, scratch: Path, request: pytest.FixtureRequest) -> None:
    kills_wanted: int = request.config.getoption("--crash-kills")
    seed: int = request.config.getoption("--crash-seed")
    plan, number, kills = Plan(seed), 0, 0
    while kills < kills_wanted:
        number += 1
        directory = scratch / str(number)
        wanted = min(KILLS_PER_SESSION, kills_wanted - kills)
        with stage(directory, runsc, PACE) as made:
            done, node_kills = disturb(made, plan, wanted)
            counted = check_session(made, "victim", turns=TURNS, node_kills=node_kills)
        kills += done
        print(f"session {number}: {done} kills ({node_kills} of nodes), {counted}", flush=True)
        assert done or wanted == 0, "the session ended before anything was killed"
    print(f"{kills} kills: {dict(plan.counted)}")


def disturb(made: Stage, plan: Plan, wanted: int) -> tuple[int, int]:
    """Run one session to its end through `wanted` kills; gives how many there were, and how many killed the node."""
    kills = node_kills = 0
    while True:
        command = (
            ["resume", "victim"] if _exists(made) else ["run", "--name", "victim", "--", made_python(), "agent.py"]
        )
        what, point = plan.next() if kills < wanted else ("", "")
        variables = {"TORPOR_CRASH_POINT": point} if point else {}
        node = made.node(*command, **variables)
        status = await_end(node, plan.seconds() if what in ("node", "sandbox", "both") else PATIENCE_SECONDS)
        if status is None and what == "sandbox":
            made.kill_sandbox()
            plan.counted["sandbox"] += 1
            kills += 1
            # The node restores it by itself; it goes on until its next disturbance.
            status = await_end(node, plan.seconds())
            what = "node"
        if status is None and what in ("node", "both"):
            node.kill()
            node.wait()
            if what == "both":
                made.kill_sandbox()
            plan.counted[what] += 1
            kills, node_kills = kills + 1, node_kills + 1
            continue
        if status == -9 and point:
            plan.counted[point.partition(":")[0]] += 1
            kills, node_kills = kills + 1, node_kills + 1
            continue
        if status == 75 and ended(made):
            return kills, node_kills
        assert status == 0, (made.directory / "node.log").read_text()[-3000:]
        return kills, node_kills


def await_end(node: subprocess.Popen[str], seconds: float) -> int | None:
    """The node's exit status, or None while it runs on after that time: kills come at random times."""
    try:
        return node.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _exists(made: Stage) -> bool:
    """Whether there is something to resume; a session that was killed before its first checkpoint is removed."""
    if not made.rows("ls"):
        return False
    if made.rows("checkpoints", "victim"):
        return True
    made.torpor("rm", "victim")
    return False


def ended(made: Stage) -> bool:
    """The kill came after the exit was committed: `resume` says so, and frees what was left."""
    return made.rows("ls")[0]["status"] == "succeeded"


def made_python() -> str:
    import sys

    return sys.executable


@pytest.mark.runsc
@pytest.mark.timeout(600)
def test_a_kill_during_creation_leaves_a_session_that_can_be_removed(session_stage: Stage) -> None:
    node = session_stage.node("run", "--name", "young", "--", made_python(), "agent.py")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (session_stage.home / "torpor.db").exists():
        assert time.monotonic() < deadline
    node.kill()
    node.wait()
    for row in session_stage.rows("ls"):
        session_stage.torpor("rm", row["session"])
    assert session_stage.rows("ls") == []
