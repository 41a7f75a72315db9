"""A person who answers what is asked and sends what is waited for, and remembers what was acknowledged.

Works beside everything else, in a thread: so what is said meets kills, forks and rewinds in the middle. A command that
failed may have done its work or not; one that said yes has.
"""

import json
import random
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from tests.crash.lives.home import LIVING_MAX, LOOK_SECONDS, Home

WAITING = """
SELECT waitpoint.session_id, waitpoint.waitpoint_id, waitpoint.kind, session.head_seq, waitpoint.created_ns
FROM waitpoint JOIN session USING (session_id)
WHERE waitpoint.resolved_ns IS NULL AND waitpoint.kind IN ('ask', 'message')
AND session.status NOT IN ('succeeded', 'failed', 'cancelled')
ORDER BY waitpoint.created_ns
"""
LEFT_SECONDS = 1.5
OWN_POINTS = {"ask": "waitpoint.resolved", "message": "message.received"}


@dataclass(slots=True)
class Said:
    """What was acknowledged to the person.

    Attributes:
        answers: by session and waitpoint, every answer that was taken: more than one is a fault.
        messages: by session, (number, text) of every message, in the order in which they were sent.
        tried: every text that was ever said.
    """

    answers: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    messages: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))
    tried: set[str] = field(default_factory=set)


class Person:
    """See the module. `enough` is set when whoever asks next is to come to its end."""

    def __init__(self, home: Home, chance: random.Random) -> None:
        self._home = home
        self._random = chance
        self._number = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._attend, daemon=True)
        self._sent_for: set[str] = set()
        self._patience: dict[str, float] = {}
        self.said = Said()
        self.enough = threading.Event()
        self.counted: Counter[str] = Counter()
        self.failure: BaseException | None = None

    def __enter__(self) -> "Person":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _attend(self) -> None:
        try:
            while not self._over.is_set():
                waiting = [one for one in self._home.look(WAITING) if self._attends(one[1], one[4])]
                done = [self._tend(*one[:4]) for one in waiting if not self._over.is_set()]
                if not any(done):
                    self._over.wait(5 * LOOK_SECONDS)
        except BaseException as failure:
            self.failure = failure

    def _attends(self, waitpoint: str, created_ns: int) -> bool:
        """Every other one is left for a while, so that who waits goes to sleep."""
        is_left = self._patience.setdefault(waitpoint, self._random.choice([0, LEFT_SECONDS]))
        return self.enough.is_set() or time.time_ns() > created_ns + is_left * 1e9

    def _tend(self, session: str, waitpoint: str, kind: str, head_seq: int) -> bool:
        """Do what is waited for, once; False: that is done already."""
        self._number += 1
        point = f"{OWN_POINTS[kind]}:1" if self._random.random() < 0.05 else ""
        variables = {"TORPOR_CRASH_POINT": point} if point else {}
        if kind == "ask":
            is_full = len([row for row in self._home.living() if row.name is not None]) >= LIVING_MAX
            ends = self.enough.is_set() or (head_seq > 120 and self._random.random() < (0.3 if is_full else 0.02))
            text = f"{'enough' if ends else 'on'} {self._number}"
            self.said.tried.add(text)
            argv = ("resolve", session, text, "--waitpoint", waitpoint, "--json")
            if self._tell(argv, point, variables) is not None:
                self.said.answers[session, waitpoint].append(text)
            return True
        if waitpoint in self._sent_for:
            return False
        for _ in range(self._random.choice([1, 1, 1, 2])):
            text = f"message {self._number}"
            self.said.tried.add(text)
            told = self._tell(("send", session, text, "--json"), point, variables)
            if told is not None:
                self.said.messages[session].append((told["number"], text))
                self._sent_for.add(waitpoint)
            self._number += 1
        return True

    def _tell(self, argv: tuple[str, ...], point: str, variables: dict[str, str]) -> dict | None:
        done = self._home.torpor(*argv, check=False, **variables)
        self.counted[f"{argv[0]} {'taken' if done.returncode == 0 else 'refused or cut'}"] += 1
        if point and done.returncode == -9:
            self.counted[f"reached {point.partition(':')[0]} (command)"] += 1
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
