"""Tasks of a simulated node: generators that yield wherever a crash may come.

A task yields None to go on later, or a key to wait until that key is woken. Waits are checked again after waking.
A task that was added and has not begun is such a place as well, so none begins with a `yield`.
"""

from collections.abc import Callable, Generator, Hashable
from typing import TypeAlias

Task: TypeAlias = Generator[Hashable | None, None, None]


GOES_ON = 0.4
"""The chance that a task which may go on does, before anything else happens."""


class TaskSet:
    """Tasks that live and die together."""

    __slots__ = ("parked", "ready")

    def __init__(self) -> None:
        self.ready: list[Task] = []
        self.parked: dict[Hashable, list[Task]] = {}

    def add(self, task: Task) -> None:
        self.ready.append(task)

    def wake(self, key: Hashable) -> None:
        if key in self.parked:
            self.ready += self.parked.pop(key)

    def clear(self) -> None:
        """Drop every task where it stands."""
        self.ready.clear()
        self.parked.clear()

    @property
    def busy(self) -> bool:
        return bool(self.ready or self.parked)

    def step(self, random: Callable[[], float], goes_on: Callable[[], bool]) -> bool:
        """Let one ready task, chosen by chance, go on to its next yield, or by the same chance some yields further.

        `goes_on` counts each of them as a step, and says whether nothing else is to happen at it.
        """
        ready = self.ready
        if not ready:
            return False
        chance = random() * len(ready)
        task = ready[int(chance)]
        chance %= 1
        try:
            key = next(task)
            while key is None and chance < GOES_ON and goes_on() and task in ready:
                chance /= GOES_ON
                key = next(task)
        except StopIteration:
            if task in ready:
                ready.remove(task)
            return True
        # The step may have cleared the set under its own task, which is then dropped where it stands.
        if key is not None and task in ready:
            ready.remove(task)
            if key in self.parked:
                self.parked[key].append(task)
            else:
                self.parked[key] = [task]
        return True
