"""Tasks of a simulated node: generators that yield wherever a crash may come.

A task yields None to go on later, or a key to wait until that key is woken. Waits are checked again after waking.
A task that was added and has not begun is such a place as well, so none begins with a `yield`.
"""

from collections.abc import Callable, Generator, Hashable
from typing import TypeAlias

Task: TypeAlias = Generator[Hashable | None, None, None]


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

    def step(self, random: Callable[[], float]) -> bool:
        """Let one ready task, chosen by chance, go on to its next yield, or to the one after it."""
        ready = self.ready
        if not ready:
            return False
        chance = random()
        task = ready[int(chance * len(ready))]
        try:
            key = next(task)
            if key is None and 0.2 < chance < 0.6 and task in ready:
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
