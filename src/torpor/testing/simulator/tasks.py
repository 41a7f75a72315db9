"""Tasks of a simulated node: generators that yield wherever a crash may come.

A task yields None to go on later, or a key to wait until that key is woken. Waits are checked again after waking.
"""

from collections.abc import Callable, Generator, Hashable
from typing import TypeAlias

Task: TypeAlias = Generator[Hashable | None, None, None]


class TaskSet:
    """Tasks that live and die together."""

    __slots__ = ("_parked", "ready")

    def __init__(self) -> None:
        self.ready: list[Task] = []
        self._parked: dict[Hashable, list[Task]] = {}

    def add(self, task: Task) -> None:
        self.ready.append(task)

    def wake(self, key: Hashable) -> None:
        if self._parked:
            self.ready += self._parked.pop(key, ())

    def clear(self) -> None:
        """Drop every task where it stands."""
        self.ready.clear()
        self._parked.clear()

    @property
    def busy(self) -> bool:
        return bool(self.ready or self._parked)

    def step(self, random: Callable[[], float]) -> bool:
        """Let one ready task, chosen by chance, go on to its next yield."""
        ready = self.ready
        if not ready:
            return False
        task = ready[int(random() * len(ready))]
        try:
            key = next(task)
        except StopIteration:
            self._leave(task)
            return True
        if key is not None:
            self._leave(task)
            self._parked.setdefault(key, []).append(task)
        return True

    def _leave(self, task: Task) -> None:
        # The step may have cleared the set under its own task.
        if task in self.ready:
            self.ready.remove(task)
