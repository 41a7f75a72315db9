"""Staging in memory: private, and nothing of it is left when its last session is gone."""

import threading
from pathlib import Path

import pytest

from torpor.core.errors import MachineUnfit
from torpor.core.ids import SessionId, SnapshotId
from torpor.runtime.staging import Staging


def staging(directory: Path, session: str) -> Staging:
    memory = directory / "memory"
    memory.mkdir(exist_ok=True)
    return Staging(directory / "home", SessionId(session), memory)


def test_the_last_session_takes_the_shared_directory_with_it(tmp_path: Path) -> None:
    one, two = staging(tmp_path, "ses_1"), staging(tmp_path, "ses_2")
    for each in (one, two):
        each.begin(SnapshotId("snp_1"), 0)
    one.clear()
    assert [path.name for path in (tmp_path / "memory").rglob("ses_*")] == ["ses_2"]
    two.clear()
    assert list((tmp_path / "memory").iterdir()) == []


def test_a_session_that_begins_while_the_last_one_goes_finds_its_directory_private(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def come_and_go(session: str) -> None:
        mine = staging(tmp_path, session)
        try:
            for number in range(300):
                snapshot = SnapshotId(f"snp_{number}")
                mine.begin(snapshot, 0)
                assert mine.image(snapshot).is_dir()
                assert mine.root.parent.stat().st_mode & 0o777 == 0o700
                mine.clear()
        except (OSError, AssertionError, MachineUnfit) as error:
            failures.append(error)

    threads = [threading.Thread(target=come_and_go, args=(f"ses_{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list((tmp_path / "memory").iterdir()) == []


def test_a_directory_of_somebody_elses_is_refused(tmp_path: Path) -> None:
    mine = staging(tmp_path, "ses_1")
    mine.root.parent.symlink_to(tmp_path)
    with pytest.raises(MachineUnfit, match="belongs to somebody else"):
        mine.begin(SnapshotId("snp_1"), 0)
