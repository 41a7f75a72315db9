"""A watched workspace, on a disk and in memory."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.snapshots.watching import Watched

from torpor.snapshots.scan import Scan

MEMORY = Path("/dev/shm")


@pytest.fixture(params=["disk", "memory"])
def watched(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """On the disk's file system, and on one where a store through a mapping moves no time stamp."""
    root = tmp_path
    if request.param == "memory":
        if not os.access(MEMORY, os.W_OK):
            pytest.skip("no memory-backed directory")
        root = MEMORY / f"torpor-test-{os.getpid()}-{id(tmp_path)}"
        root.mkdir(mode=0o700)
    watched = Watched(root)
    listed = Scan._listed

    def listing(scan: Scan, place: object, *, everything: bool = False) -> object:
        if scan._watch:
            watched.listed.add(place.path)  # type: ignore[attr-defined]
        return listed(scan, place, everything=everything)  # type: ignore[arg-type]

    for name in ("a", "a/b", "a/b/c", "quiet", "quiet/below", "empty"):
        watched.at(name).mkdir()
    for name in ("one", "a/two", "a/b/three", "a/b/c/four", "quiet/five", "quiet/below/six"):
        watched.at(name).write_bytes(name.encode() * 100)
    watched.at("a/link").symlink_to("two")
    for name in ("a/two", "a/b"):
        try:
            os.setxattr(watched.at(name), "user.before", b"x")
        except OSError:
            pytest.skip("the file system keeps no attributes")
    watched.cut()
    monkeypatch.setattr(Scan, "_listed", listing)
    yield watched
    for descriptor in watched.held:
        os.close(descriptor)
    watched.watch.close()
    if request.param == "memory":
        shutil.rmtree(root)
