"""The crash rules hold in every random schedule, and the witness notices each rule that is broken on purpose."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from torpor.testing.simulator.mutations import MUTATIONS
from torpor.testing.simulator.rules import Rules
from torpor.testing.simulator.run import Report, first_caught, run_schedules, trace_of
from torpor.testing.simulator.scheduler import HORIZON, KILLS
from torpor.testing.simulator.witness import INVARIANTS
from torpor.testing.simulator.world import World

SCHEDULES = 3000
SEEDS_UNTIL_NOTICED = 3000

NOTICED_AT = {
    "ack-forgets-close": 52,
    "cut-names-unlogged": 6502,
    "forgotten-before-logged": 175,
    "missing-output-kept": 806,
}
"""Seeds that are tried first, for rules that few schedules touch."""


@pytest.fixture(scope="module")
def report() -> Report:
    return run_schedules(range(SCHEDULES))


def test_every_invariant_holds_in_every_schedule(report: Report):
    assert report.schedules == SCHEDULES
    assert report.violations == []


def test_every_invariant_was_checked(report: Report):
    assert report.never_checked == []


@pytest.mark.parametrize(
    "what",
    [
        *("kill node", "kill sandbox", "kill both", "power cut", "silence node", "damage"),
        *("adopted", "restored: newest", "restored: older", "streams reset"),
        *("repeated", "diverged", "superseded", "rewind", "slept", "unknown, decided by a person", "refused"),
        "overtaken",
        *("held", "raise budget", "node died while a call was held"),
    ],
)
def test_every_kind_of_crash_and_every_rung_was_tried(report: Report, what: str):
    assert report.happened[what] > 0


@pytest.mark.parametrize("what", sorted(set(KILLS)))
def test_a_session_whose_call_is_held_survives_a_death_at_every_step(what: str):
    """Each death for itself, at each step of some sessions that may spend nothing at first."""
    seeds = [seed for seed in range(400) if World(seed, Rules()).plan.limit == 0]
    happened: Counter[str] = Counter()
    for seed in seeds[:3]:
        for step in range(1, HORIZON):
            world = World(seed, Rules(), stats=happened)
            world.plan.happenings = [(step, what)]
            world.plan.kills_after_commit = world.plan.kills_while_held = 0
            world.run()
    assert happened[what] > HORIZON
    assert happened["held"] > happened[what]
    died = "sandbox" if what == "kill sandbox" else "node"
    assert happened[f"{died} died while a call was held"] > HORIZON // 4


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_rule_is_noticed(name: str):
    first = [NOTICED_AT[name]] if name in NOTICED_AT else []
    caught = first_caught(name, [*first, *range(SEEDS_UNTIL_NOTICED)])
    assert caught is not None, "the witness is blind to this rule"
    assert caught[1].invariant in MUTATIONS[name].caught_by


def test_every_invariant_has_a_rule_whose_breaking_it_notices():
    assert set(INVARIANTS) <= set().union(*(mutation.caught_by for mutation in MUTATIONS.values()))


def test_a_seed_is_always_the_same_schedule():
    assert trace_of(7) == trace_of(7)
    assert trace_of(7)[0] != trace_of(8)[0]


def test_a_trace_ends_with_what_went_wrong():
    lines, violation = trace_of(1, "no-join")
    assert violation is not None
    assert violation.invariant == 6
    assert any("call.intended" in line for line in lines)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torpor.testing.simulator", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)


def test_the_command_reports_as_json_over_workers():
    done = run_command("--schedules", "450", "--workers", "2", "--json")
    result = json.loads(done.stdout)
    assert (done.returncode, result["passed"], result["schedules"]) == (0, True, 450)
    assert result["violations"] == []


def test_the_command_fails_when_a_check_never_ran():
    done = run_command("--schedules", "1", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["never_checked"]


def test_the_command_succeeds_when_a_broken_rule_is_noticed():
    done = run_command("--schedules", "50", "--break", "no-join")
    assert done.returncode == 0
    assert "a retry is a new call" in " ".join(done.stdout.split())
