"""Tasks that run one store operation at a time, in the order that a test wants: each crash and each interleaving is a
choice, never a race.

A task is a thread that stops before everything that others could see: each call of its backend and its leases, and
whatever it passes to `gate`. `step` lets it do one of them. `kill` ends it where it stands, as a kill -9 would: what it
would do afterwards, it does not do; its locks are let go.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any, Self

from torpor.snapshots.lease import Lease

PATIENCE_SECONDS = 60.0
_STEPPED = ("put", "get", "get_range", "exists", "absent", "delete", "delete_many", "list", "entries", "now_ns")


class KilledError(BaseException):
    """What a killed task ends with."""


class Task:
    """Work that gets a gate, and passes through it before each step."""

    def __init__(self, name: str, work: Callable[["Task"], None]) -> None:
        self.name = name
        self.error: BaseException | None = None
        self._killed = False
        self._may_go = threading.Semaphore(0)
        self._stands = threading.Semaphore(0)
        self._done = False
        self._thread = threading.Thread(target=self._run, args=[work], daemon=True, name=name)
        self._thread.start()
        self._await()

    @property
    def done(self) -> bool:
        return self._done

    def gate(self) -> None:
        """Stop here until `step`. Threads that the task itself starts pass."""
        if threading.current_thread() is not self._thread:
            return
        if self._killed:
            raise KilledError
        self._stands.release()
        self._may_go.acquire()
        if self._killed:
            raise KilledError

    def step(self) -> None:
        if not self._done:
            self._may_go.release()
            self._await()

    def finish(self, steps_max: int = 100_000) -> None:
        """Run it to its end, alone. What went wrong in it is raised here."""
        for _ in range(steps_max):
            if self._done:
                break
            self.step()
        assert self._done, f"{self.name} does not end"
        self.check()

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def kill(self) -> None:
        if not self._done:
            self._killed = True
            self._may_go.release()
            self._await()
            assert self._done

    def _run(self, work: Callable[["Task"], None]) -> None:
        try:
            self.gate()
            work(self)
        except KilledError:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self._done = True
            self._stands.release()

    def _await(self) -> None:
        assert self._stands.acquire(timeout=PATIENCE_SECONDS), f"{self.name} neither stops nor ends"


class SteppedBackend:
    """A backend whose every operation is a step of one task."""

    def __init__(self, inner: Any, task: Task) -> None:
        self._inner = inner
        self._task = task
        self.leases = SteppedLeases(inner.leases, task)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in _STEPPED:
            return found

        def stepped(*arguments: Any) -> Any:
            self._task.gate()
            return found(*arguments)

        return stepped


class SteppedLeases:
    def __init__(self, inner: Any, task: Task) -> None:
        self._inner = inner
        self._task = task

    def hold(self) -> "SteppedLease":
        self._task.gate()
        return SteppedLease(self._inner.hold(), self._task)

    def hold_alone(self) -> "SteppedLease":
        self._task.gate()
        return SteppedLease(self._inner.hold_alone(), self._task)

    def settle(self) -> None:
        self._inner.settle()

    def held(self) -> set[str]:
        self._task.gate()
        return self._inner.held()

    def wait(self, names: Iterable[str], seconds: float) -> set[str]:
        while set(names) & self.held():
            pass
        return set()


class SteppedLease:
    def __init__(self, inner: Lease, task: Task) -> None:
        self._inner = inner
        self._task = task

    def check(self) -> None:
        self._task.gate()
        self._inner.check()

    def release(self) -> None:
        try:
            self._task.gate()
        finally:
            self._inner.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
