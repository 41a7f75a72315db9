"""Sessions that ask, receive, sleep, send, ask a model and begin others, under a daemon, while everything is killed.

Meanwhile somebody forks them, takes them back, stops them and collects garbage, at random too. A *schedule* is one act
with one fault in it (`lives/disturber.py`); a home of mixed sessions goes through a stretch of them, then all sessions
come to their ends and `lives/accounts.py` holds what the agents say against the log and against what was acknowledged.
A witness outside watches the workspaces: at no time do two incarnations of a session run.

    pytest tests/crash/test_lives.py -s --crash-kills 2000 --crash-seed 7    # 1,000 schedules

Home number n of a run has the seed of the run plus n; one that fails is kept, and says how to run it alone. What
dies in the middle of what is not repeated: the same acts and faults are drawn, but the machine is as quick as it is.
"""

import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
from tests.crash.lives.accounts import check_home
from tests.crash.lives.disturber import Disturber
from tests.crash.lives.home import Home, make_home
from tests.crash.lives.person import Person
from tests.crash.lives.watch import Witness
from tests.crash.witness import check_nothing_left
from tests.stage import PATIENCE_SECONDS

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(14_400)]

SESSIONS = 3
SCHEDULES_A_HOME = 40


def test_no_kill_costs_a_life_an_answer_or_a_message(
    scratch: Path, runsc: Path, request: pytest.FixtureRequest
) -> None:
    option = request.config.getoption
    wanted, seed, until = option("--crash-kills") // 2, option("--crash-seed"), option("--crash-minutes")
    counted: Counter[str] = Counter()
    failed: list[str] = []
    begun, began = 0, time.monotonic()
    while begun < wanted and time.monotonic() < began + until * 60:
        schedules, at = min(SCHEDULES_A_HOME, wanted - begun), time.monotonic()
        try:
            counted += live(scratch / str(seed), runsc, seed, schedules)
        except Exception:
            failed.append(f"home {seed}: {traceback.format_exc(limit=-4)}")
            print(failed[-1], flush=True)
        begun, seed = begun + schedules, seed + 1
        took = f"home {seed - 1} took {time.monotonic() - at:.0f} s"
        print(f"{took}; {begun} schedules of {wanted}; so far {json.dumps(counted)}", flush=True)
    print(table(counted), flush=True)
    assert failed == []


def live(directory: Path, runsc: Path, seed: int, schedules: int) -> Counter[str]:
    """One home from its first session to the end of its last."""
    chance = random.Random(seed)
    kept = Path(tempfile.gettempdir()) / f"torpor-lives-{seed}-{time.time_ns()}"
    try:
        with make_home(directory, runsc, chance, kept) as home:
            return disturb(home, chance, schedules)
    except BaseException:
        repeat = f"--crash-seed {seed} --crash-kills {2 * schedules}"
        print(f"home {seed} failed, and is kept in {kept}; to repeat: {repeat}", file=sys.stderr, flush=True)
        raise


def disturb(home: Home, chance: random.Random, schedules: int) -> Counter[str]:
    """Run the schedules, let all sessions come to their ends, and check them."""
    disturber = Disturber(home, chance)
    home.up()
    for _ in range(SESSIONS):
        disturber.begin()
    person = Person(home, random.Random(chance.random()))
    with Witness(home.stage.home / "sessions") as witness, person:
        for number in range(1, schedules + 1):
            disturber.disturb()
            if number % 10 == 0:
                print(f"{number} of {schedules} schedules of {home.stage.directory.name}", flush=True)
            assert person.failure is None, person.failure
        person.enough.set()
        come_to_the_end(home, disturber, person)
    assert witness.twice == []
    assert witness.looks > len(witness.seen) > 0
    counted = check_home(home, person.said, disturber.done)
    home.torpor("down", check=False)
    check_nothing_left(home.stage)
    home.torpor("collect", "--grace", "0")
    home.torpor("verify", "--read-data")
    looks = Counter({"homes": 1, "looks of the witness": witness.looks, "lives seen": len(witness.seen)})
    checked = Counter({f"checked: {name.replace('_', ' ')}": count for name, count in counted.items()})
    return disturber.counted + person.counted + looks + checked


def come_to_the_end(home: Home, disturber: Disturber, person: Person) -> None:
    """Wait until every session has ended, with a daemon there and nobody who sleeps for good."""
    deadline = time.monotonic() + 2 * PATIENCE_SECONDS
    while home.living():
        assert time.monotonic() < deadline, (home.living(), (home.stage.home / "daemon.log").read_text()[-4000:])
        assert person.failure is None, person.failure
        if not home.alive():
            home.up()
        disturber.resume()
        home.await_events(5, 1.0)


def table(counted: Counter[str]) -> str:
    """All that was counted, as a table of Markdown."""
    rows = [f"| {name} | {count:,} |" for name, count in sorted(counted.items())]
    return "\n".join(["| what | how often |", "|---|---|", *rows])
