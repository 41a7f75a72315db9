"""Saves, restores, forgetting and collections at once, interleaved at every store operation and killed at any of them:
no page that a row needs is ever swept, and in the end nothing is left that no row needs.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.unit.snapshots.collecting import Scene
from tests.unit.snapshots.stepping import Task

from torpor.snapshots import layout, usage

SESSIONS = ("a", "b")
TASKS_MAX = 4


@pytest.fixture(autouse=True)
def everything_dead_is_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that images of 20 pages are repacked, and laid out anew when they lie in two frames."""
    monkeypatch.setattr(usage, "DEAD_BYTES_MIN", 1)
    monkeypatch.setattr(usage, "NEEDED_SHARE_MAX", 0.9)
    monkeypatch.setattr(layout, "FRAMES_OVER_IDEAL", 0)
    monkeypatch.setattr(layout, "_FRAMES_FREE", 1)


class CollectMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene()
        self.tasks: list[Task] = []
        self.first_page = dict.fromkeys(SESSIONS, 0)

    @initialize()
    def begin(self) -> None:
        for session in SESSIONS:
            self.scene.run(self.scene.save(session, 0))

    @property
    def has_room(self) -> bool:
        return len(self.tasks) < TASKS_MAX

    @precondition(lambda self: self.has_room)
    @rule(session=st.sampled_from(SESSIONS), shift=st.integers(0, 25), knows=st.integers(0, 10**6))
    def start_save(self, session: str, shift: int, knows: int) -> None:
        """The image moves on by some pages; with many, nothing of the parent's is left."""
        self.first_page[session] += shift
        ever = self.scene.ever
        known = ever[knows % len(ever)] if knows % 2 and ever else None
        self.tasks.append(Task("save", self.scene.save(session, self.first_page[session], knows=known)))

    @precondition(lambda self: self.has_room)
    @rule(choice=st.integers(0, 10**6))
    def start_restore(self, choice: int) -> None:
        self.tasks.append(Task("restore", self.scene.restore(choice)))

    @precondition(lambda self: self.has_room)
    @rule()
    def start_collect(self) -> None:
        self.tasks.append(Task("collect", self.scene.collect()))

    @precondition(lambda self: self.scene.rows)
    @rule(choice=st.integers(0, 10**6))
    def forget(self, choice: int) -> None:
        """Any row at any time; the newest too, as `torpor rm` does."""
        del self.scene.rows[list(self.scene.rows)[choice % len(self.scene.rows)]]

    @precondition(lambda self: self.tasks)
    @rule(choice=st.integers(0, 10**6), steps=st.sampled_from([1, 1, 1, 2, 5, 20]))
    def step(self, choice: int, steps: int) -> None:
        task = self.tasks[choice % len(self.tasks)]
        for _ in range(steps):
            task.step()
        self.tasks = [task for task in self.tasks if not task.done]
        task.check()

    @precondition(lambda self: self.tasks)
    @rule(choice=st.integers(0, 10**6))
    def kill(self, choice: int) -> None:
        self.tasks.pop(choice % len(self.tasks)).kill()

    @invariant()
    def everything_that_a_row_needs_is_there(self) -> None:
        self.scene.check()

    def teardown(self) -> None:
        try:
            while self.tasks:
                for task in self.tasks:
                    task.step()
                    task.check()
                self.tasks = [task for task in self.tasks if not task.done]
            self.scene.check_at_rest()
        finally:
            for task in self.tasks:
                task.kill()
            self.scene.close()


TestCollectMachine = CollectMachine.TestCase
TestCollectMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestCollectMachine.pytestmark = [pytest.mark.timeout(600)]
