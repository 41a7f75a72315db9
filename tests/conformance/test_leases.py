"""Store leases, both kinds: who is under way is seen, who has died is not waited for, and one collects at a time."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from torpor.core.clock import SystemClock
from torpor.core.errors import Conflict
from torpor.snapshots import object_lease
from torpor.snapshots.backend import LocalDirectory
from torpor.snapshots.lease import Leases
from torpor.snapshots.object_lease import LEASE_SECONDS, ObjectLeases

PATIENCE_SECONDS = 60.0
HOLD_UNTIL_KILLED = """
import sys
from pathlib import Path
from torpor.snapshots.backend import LocalDirectory
leases = LocalDirectory(Path(sys.argv[1])).leases
lease = getattr(leases, sys.argv[2])()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def backend(root: Path) -> LocalDirectory:
    return LocalDirectory(root)


@pytest.fixture(params=["flocks", "objects"])
def another(request: pytest.FixtureRequest, root: Path, backend: LocalDirectory) -> Callable[[], Leases]:
    """The leases of the same store, as another process would open them."""
    if request.param == "objects":
        return lambda: ObjectLeases(backend, SystemClock())
    return lambda: LocalDirectory(root).leases


@pytest.fixture
def leases(another: Callable[[], Leases]) -> Leases:
    return another()


def test_a_lease_is_seen_by_others_until_it_is_released(leases: Leases, another: Callable[[], Leases]) -> None:
    first, second = leases.hold(), leases.hold()
    assert len(another().held()) == 2
    first.release()
    first.release()
    assert len(another().held()) == 1
    with second:
        second.check()
        assert len(another().held()) == 1
    assert another().held() == leases.held() == set()


def test_looking_for_leases_ends_none(leases: Leases, another: Callable[[], Leases]) -> None:
    with leases.hold() as lease:
        for _ in range(3):
            assert len(another().held()) == 1
        lease.check()


def test_waiting_ends_when_the_lease_does(leases: Leases, another: Callable[[], Leases]) -> None:
    lease = leases.hold()
    names = another().held()
    waiting = threading.Thread(target=lambda: outcome.append(another().wait(names, PATIENCE_SECONDS)))
    outcome: list[set[str]] = []
    waiting.start()
    lease.release()
    waiting.join(PATIENCE_SECONDS)
    assert outcome == [set()]


def test_waiting_gives_up_on_a_lease_that_stays(leases: Leases, another: Callable[[], Leases]) -> None:
    with leases.hold():
        names = another().held()
        assert another().wait(names, 0.05) == names


def test_leases_that_come_later_are_not_waited_for(leases: Leases, another: Callable[[], Leases]) -> None:
    early = leases.hold()
    names = another().held()
    with leases.hold():
        early.release()
        assert another().wait(names, PATIENCE_SECONDS) == set()


def test_one_collects_at_a_time_and_does_not_wait_for_itself(leases: Leases, another: Callable[[], Leases]) -> None:
    for _ in range(2):
        with leases.hold_alone() as lease:
            assert another().held() == set()
            lease.check()
            with pytest.raises(Conflict) as refused:
                another().hold_alone()
            assert refused.value.code == "collect_running"


def test_of_many_that_want_to_collect_at_once_one_does(another: Callable[[], Leases]) -> None:
    ready, done = threading.Barrier(8), threading.Barrier(8)
    outcomes: list[str] = []

    def collect() -> None:
        leases = another()
        ready.wait()
        try:
            lease = leases.hold_alone()
            outcomes.append("held")
        except Conflict as refused:
            lease = None
            outcomes.append(refused.code)
        done.wait()
        if lease is not None:
            lease.release()

    threads = [threading.Thread(target=collect) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["collect_running"] * 7 + ["held"]


class TestFlocks:
    @pytest.fixture
    def holder(self, root: Path) -> Iterator[Callable[[str], "subprocess.Popen[str]"]]:
        started: list[subprocess.Popen[str]] = []

        def start(how: str) -> "subprocess.Popen[str]":
            command = [sys.executable, "-c", HOLD_UNTIL_KILLED, str(root), how]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            started.append(process)
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            return process

        yield start
        for process in started:
            process.kill()
            process.communicate()

    def test_a_killed_holder_holds_nothing(self, root: Path, backend: LocalDirectory, holder) -> None:
        process = holder("hold")
        assert len(backend.leases.held()) == 1
        process.kill()
        process.wait()
        assert backend.leases.held() == set()
        assert list((root / "leases").iterdir()) == []

    def test_a_killed_collector_collects_no_more(self, backend: LocalDirectory, holder) -> None:
        process = holder("hold_alone")
        with pytest.raises(Conflict):
            backend.leases.hold_alone()
        process.kill()
        process.wait()
        backend.leases.hold_alone().release()

    def test_a_stopped_holder_is_waited_for_and_its_death_ends_the_wait(self, backend: LocalDirectory, holder) -> None:
        process = holder("hold")
        process.send_signal(signal.SIGSTOP)
        names = backend.leases.held()
        assert backend.leases.wait(names, 0.05) == names
        process.kill()
        assert backend.leases.wait(names, PATIENCE_SECONDS) == set()

    def test_a_lease_needs_no_space(self, backend: LocalDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
        real_open = os.open

        def no_new_file(path, flags, *more, **others) -> int:
            if flags & os.O_CREAT:
                raise OSError(28, "No space left on device")
            return real_open(path, flags, *more, **others)

        monkeypatch.setattr(os, "open", no_new_file)
        with backend.leases.hold(), backend.leases.hold() as second:
            names = backend.leases.held()
            assert len(names) == 1
            second.release()
            assert backend.leases.wait(names, 0.05) == names
        assert backend.leases.held() == set()
        backend.leases.hold_alone().release()

    def test_a_holder_that_is_taken_for_dead_amid_its_birth_makes_another(
        self, backend: LocalDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import fcntl

        real_flock = fcntl.flock

        def flock_after_a_look(descriptor: int, how: int) -> None:
            monkeypatch.setattr(fcntl, "flock", real_flock)
            assert backend.leases.held() == set()
            real_flock(descriptor, how)

        monkeypatch.setattr(fcntl, "flock", flock_after_a_look)
        with backend.leases.hold():
            assert len(backend.leases.held()) == 1


class TestObjects:
    """What time does to leases that are objects. The store's clock is that of the files, so a file's time ages it."""

    @pytest.fixture
    def leases(self, backend: LocalDirectory) -> ObjectLeases:
        return ObjectLeases(backend, SystemClock())

    @staticmethod
    def age(backend: LocalDirectory, seconds: float) -> None:
        for path in backend._root.glob("holders/*/*"):
            then = path.stat().st_mtime - seconds
            os.utime(path, (then, then))

    def test_a_lease_that_was_not_renewed_ends_for_good(self, backend: LocalDirectory, leases: ObjectLeases) -> None:
        lease = leases.hold()
        self.age(backend, LEASE_SECONDS + 1)
        assert leases.held() == set()
        with pytest.raises(Conflict) as refused:
            lease.check()
        assert refused.value.code == "lease_lost"
        with pytest.raises(Conflict):
            lease.check()
        lease.release()
        assert leases.held() == set()

    def test_a_check_renews(self, backend: LocalDirectory, leases: ObjectLeases) -> None:
        with leases.hold() as lease:
            for _ in range(3):
                self.age(backend, LEASE_SECONDS - 10)
                lease.check()
            assert len(leases.held()) == 1
            assert len(backend.list("holders/")) == 1
        assert backend.list("") == []

    def test_a_lease_renews_itself(
        self, backend: LocalDirectory, leases: ObjectLeases, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(object_lease, "RENEW_SECONDS", 0.001)
        renewed = threading.Event()
        real_delete = backend.delete

        def delete(key: str) -> None:
            real_delete(key)
            renewed.set()

        monkeypatch.setattr(backend, "delete", delete)
        with leases.hold():
            self.age(backend, LEASE_SECONDS + 1)
            renewed.clear()
            assert renewed.wait(PATIENCE_SECONDS)
            assert len(leases.held()) == 1

    def test_a_holder_that_slept_until_its_end_was_forgotten_does_not_believe(
        self, backend: LocalDirectory, leases: ObjectLeases
    ) -> None:
        lease = leases.hold()
        self.age(backend, LEASE_SECONDS + 1)
        assert leases.held() == set()
        self.age(backend, object_lease._REMEMBERED_SECONDS + 1)
        assert leases.held() == set()
        assert backend.list("") == []
        with pytest.raises(Conflict):
            lease.check()
        lease.release()

    def test_a_collector_that_slept_does_not_believe_either(
        self, backend: LocalDirectory, leases: ObjectLeases
    ) -> None:
        sleeper = leases.hold_alone()
        self.age(backend, LEASE_SECONDS + 1)
        second = leases.hold_alone()
        with pytest.raises(Conflict):
            sleeper.check()
        second.release()
        with leases.hold_alone() as third:
            with pytest.raises(Conflict):
                sleeper.check()
            sleeper.release()
            third.check()

    def test_a_listing_that_is_behind_breaks_no_lease(
        self, backend: LocalDirectory, leases: ObjectLeases, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with leases.hold() as lease:
            self.age(backend, LEASE_SECONDS + 1)
            behind = backend.entries("holders/")
            lease.check()
            monkeypatch.setattr(backend, "entries", lambda _prefix: behind)
            assert len(leases.held()) == 1
            lease.check()
