"""A workspace laid over a person's directory (`torpor pull`): useful, and never outside of that directory."""

import os
import stat
from pathlib import Path

import pytest
from tests.unit.snapshots.making import World, contents

from torpor.snapshots.materialize import ExportReport


class Pull(World):
    """A world with a person's directory, and something precious beside it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.mine = root / "mine"
        self.mine.mkdir()
        self.precious = root / "precious"
        self.precious.mkdir()
        (self.precious / "keys").write_bytes(b"precious")

    def __call__(self) -> ExportReport:
        saved = self.save(f"s{next(self._numbers)}")
        report = self.store.export_workspace(saved.ref, self.mine)
        assert contents(self.precious) == {"keys": b"precious"}
        assert not [path for path in self.mine.rglob("*") if path.name.startswith(".torpor-")]
        return report


@pytest.fixture
def pull(tmp_path: Path) -> Pull:
    return Pull(tmp_path)


def test_new_and_changed_files_are_written_and_others_stay(pull: Pull) -> None:
    (pull.workspace / "d").mkdir()
    (pull.workspace / "d" / "new").write_bytes(b"new")
    (pull.workspace / "changed").write_bytes(b"after")
    (pull.workspace / "changed").chmod(0o755)
    (pull.mine / "changed").write_bytes(b"before")
    (pull.mine / "untouched").write_bytes(b"mine")
    report = pull()
    assert sorted(report.written) == [b"changed", b"d/new"]
    assert (pull.mine / "d" / "new").read_bytes() == b"new"
    assert (pull.mine / "changed").read_bytes() == b"after"
    assert stat.S_IMODE((pull.mine / "changed").stat().st_mode) == 0o755
    assert (pull.mine / "untouched").read_bytes() == b"mine"


def test_second_pull_writes_nothing(pull: Pull) -> None:
    (pull.workspace / "file").write_bytes(os.urandom(600_000))
    (pull.workspace / "link").symlink_to("file")
    pull()
    before = (pull.mine / "file").stat()
    report = pull()
    assert report == ExportReport()
    after = (pull.mine / "file").stat()
    assert (after.st_ino, after.st_ctime_ns, after.st_size) == (before.st_ino, before.st_ctime_ns, before.st_size)


def test_directory_that_is_a_link_here_is_not_entered(pull: Pull) -> None:
    (pull.workspace / "d").mkdir()
    (pull.workspace / "d" / "keys").write_bytes(b"evil")
    (pull.mine / "d").symlink_to(pull.precious)
    assert pull().blocked == [b"d"]


def test_link_planted_by_an_earlier_pull_is_not_followed(pull: Pull) -> None:
    """First the agent makes `x` a link, then a directory that holds what should land behind the link."""
    (pull.workspace / "x").symlink_to("../precious")
    (pull.workspace / "y").symlink_to("z")
    assert pull().escaping == [b"x"]
    for name in ("x", "y"):
        (pull.workspace / name).unlink()
        (pull.workspace / name).mkdir()
        (pull.workspace / name / "keys").write_bytes(b"evil")
    report = pull()
    assert report.blocked == [b"y"]
    assert report.written == [b"x/keys"]
    assert (pull.mine / "x").is_dir()
    assert not (pull.mine / "x").is_symlink()


def test_file_that_is_a_link_here_is_replaced_not_written_through(pull: Pull) -> None:
    (pull.workspace / "file").write_bytes(b"evil")
    (pull.mine / "file").symlink_to(pull.precious / "keys")
    assert pull().written == [b"file"]
    assert not (pull.mine / "file").is_symlink()
    assert (pull.mine / "file").read_bytes() == b"evil"


def test_hard_link_here_is_replaced_not_written_through(pull: Pull) -> None:
    (pull.workspace / "file").write_bytes(b"evil")
    os.link(pull.precious / "keys", pull.mine / "file")
    assert pull().written == [b"file"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_directory_in_the_way_of_a_file_blocks_it(pull: Pull, kind: str) -> None:
    path = pull.workspace / "name"
    path.write_bytes(b"x") if kind == "file" else path.symlink_to("y")
    (pull.mine / "name").mkdir()
    (pull.mine / "name" / "mine").write_bytes(b"mine")
    (pull.workspace / "other").write_bytes(b"x")
    report = pull()
    assert report.blocked == [b"name"]
    assert report.written == [b"other"]
    assert contents(pull.mine / "name") == {"mine": b"mine"}


def test_file_in_the_way_of_a_directory_blocks_it(pull: Pull) -> None:
    (pull.workspace / "name").mkdir()
    (pull.workspace / "name" / "file").write_bytes(b"x")
    (pull.mine / "name").write_bytes(b"mine")
    assert pull().blocked == [b"name"]
    assert (pull.mine / "name").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("target", "is_written"),
    [
        ("file", True),
        ("./d/file", True),
        ("../file", True),
        ("../d/./file", True),
        ("../../file", False),
        ("/etc/passwd", False),
        ("..//../precious", False),
        ("inner/../../../precious", False),
        ("inner/..", False),
    ],
)
def test_links_are_written_only_if_they_stay_inside(pull: Pull, target: str, is_written: bool) -> None:
    (pull.workspace / "d").mkdir()
    (pull.workspace / "d" / "link").symlink_to(target)
    report = pull()
    assert report.written == ([b"d/link"] if is_written else [])
    assert report.escaping == ([] if is_written else [b"d/link"])


def test_setuid_and_sticky_bits_are_dropped_and_hard_links_parted(pull: Pull) -> None:
    (pull.workspace / "tool").write_bytes(b"x")
    (pull.workspace / "tool").chmod(0o7755)
    os.link(pull.workspace / "tool", pull.workspace / "twin")
    pull()
    for name in ("tool", "twin"):
        status = (pull.mine / name).stat()
        assert stat.S_IMODE(status.st_mode) == 0o755
        assert status.st_nlink == 1


def test_files_that_the_host_runs_or_obeys_are_pointed_out(pull: Pull) -> None:
    harmless = ["src/hooks/post-commit", "git/hooks/x", "README"]
    dangerous = [".git/hooks/post-commit", ".git/config", ".envrc", "sub/.envrc", "sub/.vscode/tasks.json"]
    for name in harmless + dangerous:
        path = pull.workspace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert sorted(pull().run_by_host) == sorted(map(os.fsencode, dangerous))
