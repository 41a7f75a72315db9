"""Kills while checkpoints are skipped, or dropped for newer ones: the log covers what they would have held."""

import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from tests.crash.witness import check_attempts, check_nothing_left
from tests.stage import ROOT, Stage, stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(900)]


def kinds(made: Stage) -> Counter[str]:
    return Counter(event["kind"] for event in made.events("one"))


def test_turns_that_were_skipped_are_answered_from_the_log_after_a_crash(scratch: Path, runsc: Path) -> None:
    """The model answers at once, so a checkpoint costs all it takes; a thousandth of the time pays for one alone."""
    with stage(scratch, runsc, ["--turns", "5"]) as made:
        run = ("run", "--name", "one", "--checkpoint-share", "0.1%", "--", sys.executable, "agent.py")
        node = made.node(*run, TORPOR_CRASH_POINT="checkpoint.skipped:4")
        assert node.wait(300) == -9
        made.kill_sandbox()
        events = made.events("one")
        newest = made.rows("checkpoints", "one")[-1]
        undone = [event for event in events if event["kind"] == "call.intended" and event["seq"] > newest["seq"]]
        answered = {event["call"] for event in events if event["kind"] == "call.completed"}
        shown = made.rows("show", "one")[0]
        assert shown["crash_goes_back_to"] == newest["number"]
        assert shown["crash_undoes_turns"] == len(undone) >= 4
        assert shown["crash_calls_from_log"] >= sum(event["call"] in answered for event in undone) >= 3
        assert shown["crash_undoes_seconds"] >= 0
        assert f"crash goes back to  {newest['number']}\n" in made.torpor("show", "one").stdout
        assert shown["turns_skipped"] == made.torpor("log", "one").stdout.count("no checkpoint of its own") == 4
        assert made.node("resume", "one").wait(300) == 0
        counted = check_attempts(made, made.events("one"), node_kills=1)
        assert counted["calls"] == 6
        assert kinds(made)["call.repeated"] >= 3
        assert "is whole" in made.torpor("log", "one", "--verify").stdout
        assert made.rows("show", "one")[0]["crash_goes_back_to"] is None
        check_nothing_left(made)


def test_a_node_that_dies_when_a_cut_was_dropped_for_a_newer_one_goes_on_from_the_one_that_is_committed(
    scratch: Path, runsc: Path
) -> None:
    """A large heap that nothing compresses takes longer to store than the turns after it."""
    with stage(scratch, runsc, ["--script", "plain"]) as made:
        shutil.copy(ROOT / "scripts/bench_agent.py", made.project / "agent.py")
        run = ("run", "--name", "one", "--", sys.executable, "agent.py", "150", "12", "random")
        node = made.node(*run, TORPOR_CRASH_POINT="checkpoint.overtaken")
        assert node.wait(600) == -9
        made.kill_sandbox()
        [dropped] = [event["data"] for event in made.events("one") if event["kind"] == "checkpoint.overtaken"]
        assert dropped["number"] < dropped["by"]
        committed = [point["number"] for point in made.rows("checkpoints", "one")]
        assert dropped["by"] not in committed
        shown = made.rows("show", "one")[0]
        assert shown["checkpoints_overtaken"] == 1
        assert shown["waiting_for_the_store"] == 0, "what is left in memory of a dead node waits for nothing"
        assert shown["in_memory_bytes"] > 0
        assert made.node("resume", "one").wait(600) == 0
        check_attempts(made, made.events("one"), node_kills=1)
        numbers = [point["number"] for point in made.rows("checkpoints", "one")]
        assert numbers == sorted(set(numbers))
        assert "is whole" in made.torpor("log", "one", "--verify").stdout
        check_nothing_left(made)


def test_an_agent_whose_model_thinks_longer_than_a_freeze_has_a_checkpoint_at_every_turn(
    scratch: Path, runsc: Path
) -> None:
    """By default; what is hidden behind the model costs nothing."""
    with stage(scratch, runsc, ["--turns", "3", "--first-byte-seconds", "6"]) as made:
        made.torpor("run", "--name", "one", "--checkpoint-share", "5%", "--", sys.executable, "agent.py")
        assert kinds(made)["checkpoint.skipped"] == 0
        reasons = Counter(point["reason"] for point in made.rows("checkpoints", "one"))
        assert reasons == {"start": 1, "call": 4, "exit": 1}
