"""The harness of the power cuts: what it records is what happened, and what was not synced can be lost."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.recorder import contents, record

from torpor.testing.powercut import rebuild

SCRIPTS: dict[str, tuple[str, Callable[[dict[str, bytes]], bool]]] = {
    "a write without a sync is lost": (
        "put('a', b'old'); sync('a'); sync('.'); put('a', b'new')",
        lambda files: files == {"a": b"old"},
    ),
    "a synced write stays": ("put('a', b'x'); sync('a'); sync('.')", lambda files: files == {"a": b"x"}),
    "a name without a sync of its directory is lost": ("put('a', b'x'); sync('a')", lambda files: files == {}),
    "a rename is lost": (
        "put('a', b'x'); sync('a'); sync('.'); os.rename('a', 'b')",
        lambda files: files == {"a": b"x"},
    ),
    "a synced rename replaces": (
        "put('b', b'o'); put('a', b'x'); sync('a'); sync('b'); os.replace('a', 'b'); sync('.')",
        lambda files: files == {"b": b"x"},
    ),
    "a renamed file's bytes need their own sync": (
        "put('a', b'x'); os.rename('a', 'b'); sync('.')",
        lambda files: files == {"b": b""},
    ),
    "directories, links and truncation": (
        "os.mkdir('d'); put('d/a', b'xyz'); os.link('d/a', 'b'); os.truncate('b', 1); sync('b'); sync('.')",
        lambda files: files == {"b": b"x"},
    ),
    "an unlinked file comes back": ("put('a', b'x'); sync('a'); sync('.'); os.unlink('a')", lambda files: "a" in files),
    "sendfile is a write": (
        "put('a', b'x' * 9000); shutil.copyfile('a', 'b'); sync('b'); sync('.')",
        lambda files: files["b"] == b"x" * 9000,
    ),
    "forked children are recorded": (
        "pid = os.fork(); pid or (put('a', b'x'), sync('a'), sync('.'), os._exit(0)); os.waitpid(pid, 0)",
        lambda files: files == {"a": b"x"},
    ),
}
PRELUDE = """
import os, shutil, sys
os.chdir(sys.argv[1])
def put(name, data):
    with open(name, 'r+b' if os.path.exists(name) else 'wb') as file:
        file.write(data)
def sync(name):
    descriptor = os.open(name, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
"""


@pytest.mark.parametrize("claim", sorted(SCRIPTS))
def test_power_cut_drops_what_was_not_synced(claim: str, tmp_path: Path) -> None:
    script, expected = SCRIPTS[claim]
    recording = record(tmp_path, "-c", PRELUDE + script)
    rebuild(recording.operations, recording.root, tmp_path / "again", lambda: True)
    assert contents(tmp_path / "again") == contents(recording.root)
    rebuild(recording.operations, recording.root, tmp_path / "cut", lambda: False)
    assert expected(contents(tmp_path / "cut")), contents(tmp_path / "cut")


def test_stores_through_a_mapping_are_not_passed_over(tmp_path: Path) -> None:
    script = "import mmap; put('a', b'x'); f = open('a', 'r+b'); m = mmap.mmap(f.fileno(), 1); m[0] = 0"
    recording = record(tmp_path, "-c", PRELUDE + script)
    with pytest.raises(ValueError, match="mapping"):
        rebuild(recording.operations, recording.root, tmp_path / "again", lambda: True)
