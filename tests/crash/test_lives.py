"""Sessions that ask, receive, sleep, send and ask a model, under a node daemon, while everything is killed at random.

The driver is a person with a shell: it answers what is asked and sends what is waited for, and remembers what it was
told is done. A witness outside watches the workspaces: at no time do two incarnations of a session run. No session is
lost, and what was acknowledged is seen exactly once, in order, by every agent.
"""

import json
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.crash.witness import check_nothing_left
from tests.stage import PATIENCE_SECONDS, Stage, stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(7200)]

NAMES = ("ann", "ben", "cay")
ROUNDS = 6
CONFIG = "[hibernate]\nlinger_seconds = 0.3\npaused_seconds = {paused}\nready_seconds = {ready}\n"
POINTS = [
    *("hibernate.begun", "session.asleep", "hibernate.freed", "wake.begun", "waitpoint.created", "waitpoint.resolved"),
    *("message.received", "call.intended", "call.sent", "call.completed", "checkpoint.cut", "checkpoint.paused"),
    *("checkpoint.imaged", "checkpoint.stored", "checkpoint.committed", "exit.committed"),
]
KILLS_A_HOME = 25
BEAT_SECONDS = 0.1


class Witness:
    """Sees which incarnations write into their workspaces, two looks in a row."""

    def __init__(self, sessions: Path) -> None:
        self._sessions = sessions
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.twice: list[str] = []
        self.looks = 0

    def __enter__(self) -> "Witness":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        seen: dict[Path, str] = {}
        before: set[Path] = set()
        while not self._over.wait(BEAT_SECONDS):
            now = {path: _text(path) for path in self._sessions.glob("*/incarnations/*/workspace/beat")}
            moved = {path for path, text in now.items() if text and seen.get(path, text) != text}
            running = Counter(path.parents[3].name for path in moved & before)
            self.twice += [name for name, count in running.items() if count > 1]
            seen, before = now, moved
            self.looks += 1


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # It goes with its incarnation.


class Person:
    """Answers and sends, and remembers what was acknowledged."""

    def __init__(self, made: Stage) -> None:
        self._made = made
        self._said = 0
        self.resolved: Counter[str] = Counter()
        self.sent: dict[str, list[str]] = {name: [] for name in NAMES}

    def attend(self) -> None:
        """Do for each session what it waits for, once."""
        names = {row["session"]: row["name"] for row in self._made.rows("ls")}
        for row in self._made.rows("waitpoints"):
            name = names[row["session"]]
            if row["kind"] == "ask":
                done = self._made.torpor("resolve", name, f"yes {row['question']}", check=False)
                self.resolved[row["question"]] += done.returncode == 0
            elif row["kind"] == "message":
                self._said += 1
                text = f"message {self._said}"
                if self._made.torpor("send", name, text, check=False).returncode == 0:
                    self.sent[name].append(text)


class Disturber:
    """Kills, at random, the same for the same seed."""

    def __init__(self, made: Stage, chance: random.Random) -> None:
        self._made = made
        self._random = chance
        self.counted: Counter[str] = Counter()

    def disturb(self) -> None:
        what = self._random.choice(["daemon", "sandboxes", "both", "point", "point", "down", "replace"])
        self.counted[what] += 1
        if what in ("sandboxes", "both"):
            self._made.kill_sandbox()
        if what in ("daemon", "both", "point"):
            self._made.kill_daemon()
        if what == "down":
            self._made.torpor("down", check=False)
        point = f"{self._random.choice(POINTS)}:{self._random.randint(1, 3)}" if what == "point" else ""
        if point:
            self.counted[point.partition(":")[0]] += 1
        replace = ["--replace"] if what == "replace" else []
        self._made.torpor("up", *replace, check=False, **({"TORPOR_CRASH_POINT": point} if point else {}))

    def seconds(self) -> float:
        return self._random.uniform(0.2, 4.0)


@contextmanager
def home(directory: Path, runsc: Path, chance: random.Random) -> Iterator[Stage]:
    with stage(directory, runsc, ["--script", "plain"]) as made:
        shutil.copy(Path(__file__).with_name("lives_agent.py"), made.project / "lives.py")
        made.home.mkdir(exist_ok=True)
        paused, ready = chance.choice([(0, 0), (2, 0), (0, 2), (1, 2)])
        (made.home / "config.toml").write_text(CONFIG.format(paused=paused, ready=ready))
        yield made


def test_no_kill_costs_a_life_an_answer_or_a_message(
    scratch: Path, runsc: Path, request: pytest.FixtureRequest
) -> None:
    wanted = request.config.getoption("--crash-kills") // 2
    chance, kills = random.Random(request.config.getoption("--crash-seed")), 0
    while kills < wanted:
        with home(scratch / str(kills), runsc, chance) as made:
            done, counted = live(made, chance, min(KILLS_A_HOME, wanted - kills))
        kills += done
        print(f"{kills} disturbances: {dict(counted)}", flush=True)


def live(made: Stage, chance: random.Random, kills: int) -> tuple[int, Counter[str]]:
    """Run the sessions to their ends through so many disturbances."""
    person, disturber = Person(made), Disturber(made, chance)
    for name in NAMES:
        made.torpor("run", "-d", "--name", name, "--", sys.executable, "lives.py", name, str(ROUNDS))
    with Witness(made.home / "sessions") as witness:
        deadline = time.monotonic() + 4 * PATIENCE_SECONDS
        next_at, done = time.monotonic() + disturber.seconds(), 0
        while any(row["status"] not in ("succeeded", "failed") for row in rows(made)):
            assert time.monotonic() < deadline, (rows(made), (made.home / "daemon.log").read_text()[-4000:])
            person.attend()
            if done < kills and time.monotonic() > next_at:
                disturber.disturb()
                done, next_at = done + 1, time.monotonic() + disturber.seconds()
            elif not alive(made):
                made.torpor("up", check=False)
    assert witness.looks > 0
    assert witness.twice == []
    for name in NAMES:
        check(made, person, name)
    made.torpor("down")
    check_nothing_left(made)
    return max(done, 1), disturber.counted


def rows(made: Stage) -> Sequence[dict[str, Any]]:
    return made.rows("ls")


def alive(made: Stage) -> bool:
    return made.torpor("status", "--pid", check=False).returncode == 0


def check(made: Stage, person: Person, name: str) -> None:
    """What the agent says that it was told is what was acknowledged, each once; and its log is whole."""
    account = json.loads(made.torpor("output", name).stdout)
    assert account["memory"] == account["file"]
    told = [line.split("|") for line in account["memory"]]
    assert [line[0] for line in told] == [f"yes {name} {number}" for number in range(ROUNDS)]
    assert {line[2] for line in told} == {"resolved"}
    assert [line[4] for line in told] == [str(number) for number in range(1, ROUNDS + 1)]
    received = [line[1] for line in told]
    assert max(person.resolved[f"{name} {number}"] for number in range(ROUNDS)) <= 1
    events = made.events(name)
    inbox = [event["text"] for event in events if event["kind"] == "message.received"]
    assert [text for text in inbox if text in person.sent[name]] == person.sent[name]
    assert received == inbox[:ROUNDS]
    resolved = Counter(event["data"]["waitpoint"] for event in events if event["kind"] == "waitpoint.resolved")
    assert set(resolved.values()) == {1}
    assert [row["text"] for row in made.rows("tail", name)] == [f"{name} {number}" for number in range(ROUNDS)]
    assert "is whole" in made.torpor("log", name, "--verify").stdout
