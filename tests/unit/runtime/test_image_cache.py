"""Images of sleeping sessions: bounded by size and time, and never taken from who is using one."""

import os
import threading
from pathlib import Path

import pytest

from torpor.core.ids import SessionId, SnapshotId
from torpor.runtime import image_cache
from torpor.runtime.image_cache import NOTHING, CacheLimits, memory_is_short, staging_directory, trim
from torpor.runtime.staging import Staging

NOW_NS = 2_000_000_000_000_000_000
MEGABYTE = 1_000_000
PLENTY = CacheLimits(100 * MEGABYTE, 3600)


class Sessions:
    """Sleeping sessions of one TORPOR_HOME."""

    def __init__(self, root: Path) -> None:
        self._home, self._memory = root / "home", root / "memory"
        self._memory.mkdir()
        self.directory = staging_directory(self._home, self._memory)

    def staging(self, name: str) -> Staging:
        return Staging(self._home, SessionId(f"ses_{name}"), self._memory)

    def asleep(self, name: str, *, age_seconds: int, megabytes: int = 1, whole: bool = True) -> Staging:
        """A session that was stopped so long ago, with its image."""
        staging, snapshot = self.staging(name), SnapshotId(f"snp_{name}")
        staging.begin(snapshot, 0)
        (staging.image(snapshot) / "pages.img").write_bytes(b"x" * (megabytes * MEGABYTE))
        if whole:
            staging.complete(snapshot)
            mark = staging.root / snapshot / image_cache.COMPLETE
            os.utime(mark, ns=(NOW_NS - age_seconds * 10**9,) * 2)
        return staging

    @property
    def left(self) -> list[str]:
        return sorted(path.parent.name for path in self.directory.glob("*/*"))


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path)


def test_the_oldest_go_first_until_the_rest_fits(sessions: Sessions) -> None:
    for name, age_seconds in (("old", 300), ("new", 10), ("middle", 200)):
        sessions.asleep(name, age_seconds=age_seconds, megabytes=2)
    assert trim(sessions.directory, CacheLimits(5 * MEGABYTE, 3600), NOW_NS) == 2 * MEGABYTE
    assert sessions.left == ["ses_middle", "ses_new"]


def test_one_that_fits_stays_beside_a_newer_one_that_does_not(sessions: Sessions) -> None:
    sessions.asleep("huge", age_seconds=1, megabytes=9)
    sessions.asleep("small", age_seconds=50)
    trim(sessions.directory, CacheLimits(5 * MEGABYTE, 3600), NOW_NS)
    assert sessions.left == ["ses_small"]


def test_none_stays_longer_than_its_time(sessions: Sessions) -> None:
    sessions.asleep("late", age_seconds=3601)
    sessions.asleep("early", age_seconds=3599)
    trim(sessions.directory, PLENTY, NOW_NS)
    assert sessions.left == ["ses_early"]


def test_an_unfinished_image_of_a_dead_node_is_garbage(sessions: Sessions) -> None:
    sessions.asleep("torn", age_seconds=0, whole=False)
    sessions.asleep("whole", age_seconds=0)
    trim(sessions.directory, PLENTY, NOW_NS)
    assert sessions.left == ["ses_whole"]


def test_what_is_held_is_neither_taken_nor_counted(sessions: Sessions) -> None:
    held = sessions.asleep("held", age_seconds=5000, megabytes=9)
    sessions.asleep("other", age_seconds=10)
    held.hold()
    trim(sessions.directory, CacheLimits(2 * MEGABYTE, 3600), NOW_NS)
    assert sessions.left == ["ses_held", "ses_other"]
    held.let_go()
    trim(sessions.directory, CacheLimits(2 * MEGABYTE, 3600), NOW_NS)
    assert sessions.left == ["ses_other"]


def test_what_is_held_is_not_freed_either(sessions: Sessions) -> None:
    """A collector's room for images is of no session, as what a dead node left of one that is gone."""
    held = sessions.asleep("held", age_seconds=0, whole=False)
    held.hold()
    image_cache.free(held.root)
    assert sessions.left == ["ses_held"]
    held.let_go()
    image_cache.free(held.root)
    assert sessions.left == []


def test_two_processes_may_hold_one_session(sessions: Sessions) -> None:
    """Who looks at a session's images does not shut out its node."""
    one, other = sessions.asleep("a", age_seconds=0), sessions.staging("a")
    one.hold()
    other.hold()
    one.let_go()
    trim(sessions.directory, NOTHING, NOW_NS)
    assert sessions.left == ["ses_a"]
    other.let_go()


def test_when_all_is_gone_so_are_the_directories(sessions: Sessions) -> None:
    sessions.asleep("a", age_seconds=0)
    trim(sessions.directory, NOTHING, NOW_NS)
    assert not sessions.directory.exists()
    assert trim(sessions.directory, NOTHING, NOW_NS) == 0


def test_a_session_that_held_nothing_leaves_nothing(sessions: Sessions) -> None:
    staging = sessions.staging("a")
    staging.hold()
    assert staging.root.is_dir()
    staging.let_go()
    assert not sessions.directory.exists()


def test_a_directory_of_somebody_elses_is_left_alone(sessions: Sessions, tmp_path: Path) -> None:
    precious = tmp_path / "elsewhere/ses_a/snp_a"
    precious.mkdir(parents=True)
    sessions.directory.symlink_to(tmp_path / "elsewhere")
    assert trim(sessions.directory, NOTHING, NOW_NS) == 0
    assert precious.is_dir()


def test_a_session_that_wakes_while_images_are_freed_has_a_directory_of_its_own(sessions: Sessions) -> None:
    failures: list[BaseException] = []
    stop = threading.Event()

    def wake() -> None:
        try:
            for number in range(300):
                staging, snapshot = sessions.staging("a"), SnapshotId(f"snp_{number}")
                staging.hold()
                staging.begin(snapshot, 0)
                staging.complete(snapshot)
                assert staging.cached(snapshot, 0) is not None
                staging.let_go()
        except (OSError, AssertionError) as error:
            failures.append(error)
        finally:
            stop.set()

    def free() -> None:
        while not stop.is_set():
            trim(sessions.directory, NOTHING, NOW_NS)

    threads = [threading.Thread(target=wake), threading.Thread(target=free)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_an_image_of_another_size_than_the_checkpoints_is_not_trusted(sessions: Sessions) -> None:
    staging = sessions.asleep("a", age_seconds=0)
    assert staging.cached(SnapshotId("snp_a"), MEGABYTE) is not None
    assert staging.cached(SnapshotId("snp_a"), MEGABYTE + 1) is None
    assert staging.cached(SnapshotId("snp_b"), MEGABYTE) is None


def test_images_of_sleeping_sessions_make_room_for_a_new_one(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine has as much memory as it had without them."""
    sessions.asleep("asleep", age_seconds=0, megabytes=50)
    needed = 40 * MEGABYTE
    room = needed + (33 << 20)

    def available() -> int:
        used = sum(path.stat().st_size for path in sessions.directory.rglob("*") if path.is_file())
        return room - used

    monkeypatch.setattr("torpor.runtime.staging.available_memory", available)
    waking = sessions.staging("waking")
    assert not waking.has_room(needed)
    waking.begin(SnapshotId("snp_1"), needed)
    assert sessions.left == ["ses_waking"]


@pytest.mark.parametrize(
    ("text", "is_short"),
    [
        ("some avg10=12.50 avg60=1.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n", True),
        ("some avg10=2.50 avg60=50.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n", False),
    ],
)
def test_memory_is_short_when_processes_have_lately_waited_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, is_short: bool
) -> None:
    (tmp_path / "memory").write_text(text)
    monkeypatch.setattr(image_cache, "PRESSURE_FILE", tmp_path / "memory")
    assert memory_is_short() is is_short


def test_a_kernel_that_counts_no_pressure_is_never_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "PRESSURE_FILE", tmp_path / "missing")
    assert not memory_is_short()
