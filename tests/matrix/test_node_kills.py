"""The node dies by kill -9 at each state of a call: at most one more attempt, only while an answer was arriving.

Once with the sandbox alive, which the next node adopts; once with the sandbox dead as well, which is then restored.
"""

import sys
import urllib.request
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from tests.crash.witness import check_session
from tests.stage import PATIENCE_SECONDS, Stage, stage

from torpor.core.crash import CRASH_POINTS
from torpor.testing.model_faults import Fault, FaultRule

TURNS = 6
NAME = "victim"
TORN = {"call.sent": 1, "call.retried": 1, "call.received": 1}
"""Where an attempt is given up: it was sent, and its answer was not there."""
CALL_POINTS = [point for point in CRASH_POINTS if point.startswith("call.")]
PACE = ["--turns", str(TURNS), "--first-byte-seconds", "1", "--chunk-seconds", "0.02"]

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(300)]


def under_a_budget(made: Stage) -> list[str]:
    """Options that keep a call's intent and its sending apart, and never hold it."""
    made.home.mkdir(mode=0o700)
    (made.home / "config.toml").write_text('[prices."*"]\ninput = "1"\noutput = "1"\n')
    return ["--budget", "1000000"]


def refuse_once(made: Stage) -> None:
    """The provider refuses the second call for now."""
    rule = FaultRule(fault=Fault.STATUS_429, times=1, contains="tool_call_id", retry_after="0")
    urllib.request.urlopen(f"{made.control}/faults", data=msgspec.json.encode(rule)).close()


def arriving_at_the_death(made: Stage) -> int:
    """How many calls the first node had sent without having their answers."""
    kinds = [event["kind"] for event in made.events(NAME)]
    first = kinds[: kinds.index("lease.acquired", kinds.index("lease.acquired") + 1)]
    return first.count("call.sent") - first.count("call.completed")


@pytest.mark.parametrize("also_sandbox", [False, True], ids=["node", "node-and-sandbox"])
@pytest.mark.parametrize("point", CALL_POINTS)
def test_a_call_is_sent_again_only_if_its_answer_was_arriving(
    point: str, also_sandbox: bool, scratch: Path, runsc: Path
) -> None:
    with stage(scratch, runsc, PACE) as made:
        refused = point == "call.retried"
        if refused:
            refuse_once(made)
        # The third call, and a model that takes its time, so that the checkpoint of an earlier one is committed: an
        # agent that has to begin anew may do something else, and never makes the call again. A call has one piece for
        # each event it got.
        at_pass = {"call.retried": 1, "call.received": 40}.get(point, 3)
        variables = {"TORPOR_CRASH_POINT": f"{point}:{at_pass}"}
        options = under_a_budget(made) if point == "call.intended" else []
        node = made.node("run", "--name", NAME, *options, "--", sys.executable, "agent.py", **variables)
        assert node.wait(PATIENCE_SECONDS) == -9, (made.directory / "node.log").read_text()
        if also_sandbox:
            made.kill_sandbox()
        made.torpor("resume", NAME)
        counted = check_session(made, NAME, turns=TURNS, node_kills=1)
        # An agent that read its answer may have made its next call before the end of the last was written down.
        torn = arriving_at_the_death(made) if point == "call.delivered" else TORN.get(point, 0)
        assert counted["torn"] == torn
        assert counted["sent"] == counted["calls"] + torn
        # Death right after `call.sent` may come before the request left: then nobody was asked twice.

        assert counted["calls"] <= counted["asked"] <= counted["sent"]
        if not torn:
            assert counted["asked"] == counted["calls"], "paid for twice"
        again = Counter(line["digest"] for line in made.witness if line["event"] == "start")
        assert max(again.values()) <= 1 + torn
        if torn:
            assert "torn" in made.torpor("log", NAME).stdout
