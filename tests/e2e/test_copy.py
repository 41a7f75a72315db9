"""`torpor cp` with a real sandbox: both ways, hostile trees, interruptions."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from tests.stage import Stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]


def test_files_and_directories_go_both_ways_whole(waiting: Stage, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    tree = tmp_path / "tree"
    (tree / "below/empty").mkdir(parents=True)
    (tree / "below/data").write_bytes(data)
    (tree / "below/data").chmod(0o750)
    os.utime(tree / "below/data", ns=(0, 1_600_000_000_123_456_789))
    (tree / "link").symlink_to("below/data")
    waiting.torpor("cp", str(tree), "one:/workspace")
    waiting.torpor("cp", "one:tree", str(tmp_path / "back"))
    back = tmp_path / "back"
    assert (back / "below/data").read_bytes() == data
    assert (back / "below/data").stat().st_mode & 0o777 == 0o750
    assert (back / "below/data").stat().st_mtime_ns == 1_600_000_000_123_456_789
    assert (back / "below/empty").is_dir()
    assert (back / "link").readlink() == Path("below/data")
    waiting.torpor("cp", str(tree / "below/data"), "one:/tmp/other")
    waiting.torpor("cp", "one:/tmp/other", str(tmp_path))
    assert (tmp_path / "other").read_bytes() == data
    refused = waiting.torpor("cp", "one:tree", str(tmp_path), check=False)
    assert (refused.returncode, "copy_in_the_way" in refused.stderr) == (75, True)
    refused = waiting.torpor("cp", "one:nothing", str(tmp_path), check=False)
    assert (refused.returncode, "copy_impossible" in refused.stderr) == (64, True)
    refused = waiting.torpor("cp", str(tree), "one:/workspace", check=False)
    assert (refused.returncode, "copy_impossible" in refused.stderr) == (64, True)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_copy_leaves_nothing(waiting: Stage, tmp_path: Path) -> None:
    place = tmp_path / "zeros"
    waiting.torpor("exec", "one", "--", "truncate", "-s", "100G", "/tmp/endless")
    command = [*waiting.command, "cp", "one:/tmp/endless", str(place)]
    process = subprocess.Popen(command, env=waiting.environment, cwd=waiting.project, stderr=subprocess.PIPE)
    while not [path for path in tmp_path.iterdir() if path.stat().st_size]:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []
