"""Which files of the workspace a capture has to read whatever their time stamps say."""

import os
from pathlib import Path

from torpor.sandbox.gvisor import _open_for_writing


def test_files_open_for_writing_or_by_a_name_that_is_gone_are_found(tmp_path: Path) -> None:
    for name in ("written", "read", "linked", "removed"):
        (tmp_path / name).write_bytes(b"x")
    inode = {name: (tmp_path / name).stat().st_ino for name in ("written", "read", "linked", "removed")}
    with (
        (tmp_path / "written").open("r+b"),
        (tmp_path / "read").open("rb"),
        (tmp_path / "linked").open("rb"),
        (tmp_path / "removed").open("rb"),
    ):
        os.link(tmp_path / "linked", tmp_path / "other name")
        (tmp_path / "linked").unlink()
        (tmp_path / "removed").unlink()
        found = set(_open_for_writing(Path("/proc/self"), tmp_path.stat().st_dev))
    assert {name for name, number in inode.items() if number in found} == {"written", "linked"}
