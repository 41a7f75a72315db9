"""Everything is looked at when it is not certain what a watch heard; a watch's life from a restore on."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.snapshots.making import World, flat, settled, time_stamps_move
from tests.unit.snapshots.watching import Watched, is_seen

from torpor.snapshots.capture import capture, watch_tree
from torpor.snapshots.watch import DirectoryWatch, open_watch


class TestLost:
    """Everything is looked at when it is not certain what was heard."""

    def test_capture_that_was_not_stored_loses_nothing(self, watched: Watched) -> None:
        watched.at("a/two").write_bytes(b"first")
        watched.cut(committed=False)
        watched.at("quiet/five").write_bytes(b"second")
        watched.cut(committed=False)
        watched.listed.clear()
        is_seen(watched, watched.cut())
        assert watched.listed == {b"a/", b"quiet/"}

    def test_capture_that_failed_loses_nothing(self, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("one", "a/two", "a/b/three", "quiet/five"):
            watched.at(name).write_bytes(b"changed")
        with monkeypatch.context() as patched:
            patched.setattr("torpor.snapshots.scan.open_file", _fails_at(3))
            with pytest.raises(Exception, match="cannot capture"):
                watched.cut()
        watched.at("a/b/c/four").write_bytes(b"changed later")
        is_seen(watched, watched.cut())
        watched.at("a/b/three").write_bytes(b"changed last")
        is_seen(watched, watched.cut())

    def test_index_of_another_watch_is_not_trusted(self, watched: Watched) -> None:
        other = DirectoryWatch()
        watched.at("a/two").write_bytes(b"seen by the first watch only")
        watched.watch, first = other, watched.watch
        watched.listed.clear()
        is_seen(watched, watched.cut())
        assert b"quiet/below/" in watched.listed
        watched.listed.clear()
        watched.cut()
        assert watched.listed == set()
        first.close()

    def test_events_that_the_kernel_dropped_make_the_capture_look_at_everything(self, watched: Watched) -> None:
        most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
        for number in range(most // 2 + 100):  # Each directory's watch speaks once, and then that it is gone.
            watched.at(f"d{number}").mkdir()
        watched.cut()
        for number in range(most // 2 + 100):
            watched.at(f"d{number}/file").touch()
        watched.listed.clear()
        is_seen(watched, watched.cut())
        assert b"quiet/below/" in watched.listed
        watched.listed.clear()
        watched.at("d5/file").write_bytes(b"x")
        is_seen(watched, watched.cut())
        assert watched.listed == {b"d5/"}

    def test_closed_watch_makes_the_capture_look_at_everything(self, watched: Watched) -> None:
        watched.watch.close()
        watched.at("a/two").write_bytes(b"x")
        captured = watched.cut()
        is_seen(watched, captured)
        assert captured.generation == 0


def _fails_at(number: int) -> Callable[..., object]:
    from torpor.snapshots.scan import open_file

    calls = iter(range(1, number + 1))

    def failing(*arguments: object, **named: object) -> object:
        if next(calls, number) == number:
            raise OSError(5, "Input/output error")
        return open_file(*arguments, **named)  # type: ignore[arg-type]

    return failing


LIMITED = """
import sys
from pathlib import Path
limit, most = sys.argv[2].split("=")
Path("/proc/sys/user/max_inotify_" + limit).write_text(most)
from torpor.snapshots.watch import open_watch
from tests.unit.snapshots.watching import Watched
from tests.unit.snapshots.making import flat
if limit == "instances":
    assert open_watch() is None
    sys.exit(print("ok"))
watched = Watched(Path(sys.argv[1]))
for number in range(5):
    watched.at(f"d{number}").mkdir()
for _ in range(3):
    watched.at("d1/file").write_bytes(b"x")
    captured = watched.cut()
    assert flat(captured) == watched.everything()
    assert captured.generation == 0
print("ok")
"""


@pytest.mark.parametrize("limit", ["watches=3", "instances=0"])
def test_machine_without_watches_left_is_no_error(tmp_path: Path, limit: str) -> None:
    """In a user namespace of its own, where the limits can be set."""
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", LIMITED, str(tmp_path), limit],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare failed" in done.stderr or "Read-only" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.stdout == "ok\n", done.stderr


def test_restored_workspace_is_watched_from_the_beginning(tmp_path: Path) -> None:
    world = World(tmp_path)
    (world.workspace / "d" / "deep").mkdir(parents=True)
    for name in ("d/file", "d/deep/file", "linked"):
        (world.workspace / name).write_bytes(name.encode())
    os.link(world.workspace / "linked", world.workspace / "d" / "linked")
    saved = world.save("a")
    world.workspace = world.fresh("restored")
    index = settled(world.store.restore_workspace(saved.ref, world.workspace))
    watch = open_watch()
    assert watch is not None
    index = watch_tree(world.workspace, index, watch)
    untouched = capture(world.workspace, world.fresh("staging"), index, watch=watch)
    assert untouched.root is index.root
    time_stamps_move(world.root)
    (world.workspace / "d" / "deep" / "file").write_bytes(b"changed")
    changed = capture(world.workspace, world.fresh("staging"), index, watch=watch)
    assert changed.staged_bytes == len("changed")
    assert flat(changed) == flat(capture(world.workspace, world.fresh("staging")))
    watch.close()
