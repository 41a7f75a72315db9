"""Tasks of a simulated node: generators that yield wherever a crash may come.

A task yields None to go on later, or a key to wait until that key is woken. Waits are checked again after waking.
"""

from collections.abc import Callable, Generator, Hashable
from typing import TypeAlias

Task: TypeAlias = Generator[Hashable | None, None, None]


class TaskSet:
    """Tasks that live and die together."""

    __slots__ = ("_parked", "_ready")

    def __init__(self) -> None:
        self._ready: list[Task] = []
        self._parked: dict[Hashable, list[Task]] = {}

    def add(self, task: Task) -> None:
        self._ready.append(task)

    def wake(self, key: Hashable) -> None:
        woken = self._parked.pop(key, None)
        if woken:
            self._ready += woken

    def clear(self) -> None:
        """Drop every task where it stands."""
        self._ready.clear()
        self._parked.clear()

    @property
    def busy(self) -> bool:
        return bool(self._ready or self._parked)

    def step(self, random: Callable[[], float]) -> bool:
        """Let one ready task, chosen by chance, go on to its next yield."""
        ready = self._ready
        if not ready:
            return False
        index = int(random() * len(ready))
        task = ready[index]
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
        if task in self._ready:
            self._ready.remove(task)
