"""A power cut at any moment loses nothing that was acknowledged as durable, and leaves a log that verifies.

The record of processes that wrote calls is cut at many places; what was not synced by then is dropped, kept, or kept in
part at random (RECOVERY 6).
"""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from torpor.core.errors import NotFound
from torpor.core.ids import CallId
from torpor.db import calls, log, sessions, verify
from torpor.db.database import Transaction, open_database
from torpor.testing.clock import FakeClock
from torpor.testing.powercut import Kind, Operation, read_record, rebuild

REPOSITORY = Path(__file__).parents[3]
CUTS = 40


@dataclass(frozen=True)
class Recording:
    root: Path
    operations: list[Operation]

    @property
    def acknowledgements(self) -> list[int]:
        """The cuts right after the writer was told of something."""
        said = f"{self.root}/said"
        return [n for n, op in enumerate(self.operations, 1) if op.kind is Kind.WRITE and op.path == said]

    def said_before(self, cut: int) -> list[str]:
        """What the writer was told of before the cut."""
        lines = [self.operations[n - 1].data for n in self.acknowledgements if n <= cut]
        return b"".join(lines).decode().splitlines()


def build_recorder() -> Path:
    folder = REPOSITORY / "native" / "powercut"
    subprocess.run(["make", "-s", "-C", folder], check=True)
    return folder / "build" / "powercut.so"


def record(directory: Path, *argv: str | Path) -> Recording:
    """Run a program on an empty directory below `directory`, and record what it does to it."""
    root, log_path = (directory / "root").resolve(), directory / "record"
    root.mkdir()
    environment = {
        **os.environ,
        "LD_PRELOAD": str(build_recorder()),
        "TORPOR_POWERCUT_ROOT": str(root),
        "TORPOR_POWERCUT_LOG": str(log_path),
    }
    subprocess.run([sys.executable, *argv, root], check=True, env=environment, cwd=REPOSITORY)
    return Recording(root, read_record(log_path))


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(tmp_path_factory.mktemp("powercut"), "-m", "tests.unit.db.powercut_writer")


def test_record_without_a_cut_gives_the_very_directory(recording: Recording, tmp_path: Path) -> None:
    rebuild(recording.operations, recording.root, tmp_path / "again", lambda: True)
    whole = contents(recording.root)
    whole.pop("home/torpor.db-shm")
    assert contents(tmp_path / "again") == whole


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kept", ["nothing", "some", "everything"])
async def test_power_cut_keeps_what_was_acknowledged(recording: Recording, tmp_path: Path, kept: str) -> None:
    chance = random.Random(kept)
    lost = 0
    told = [n for n in recording.acknowledgements if recording.operations[n - 1].data.startswith(b"event")]
    cuts = told + chance.sample(range(len(recording.operations) + 1), CUTS)
    for number, cut in enumerate(sorted(cuts)):
        share = {"nothing": 0.0, "some": chance.random(), "everything": 1.0}[kept]
        directory = tmp_path / str(number)
        rebuild(recording.operations[:cut], recording.root, directory, lambda share=share: chance.random() < share)
        lost += await check(directory, recording.said_before(cut))
    print(f"{len(recording.operations)} operations, {len(cuts)} cuts, {lost} unsynced chunks lost")
    assert (lost > 0) == (kept == "nothing") or kept == "some"


async def check(directory: Path, said: Sequence[str]) -> int:
    """The promises of the log hold in `directory`; returns how many chunks are lost that were not yet durable."""
    database = await open_database(f"sqlite://{directory}/home/torpor.db", clock=FakeClock())
    try:
        return await database.read(lambda tx: check_rows(tx, said))
    finally:
        await database.close()


def check_rows(tx: Transaction, said: Sequence[str]) -> int:
    try:
        session = sessions.find(tx, "cut")
    except NotFound:
        assert not said
        return 0
    assert verify.verify_chain(tx, session.session_id) == []
    present = {event.seq for event in log.events(tx, session.session_id)}
    lost = 0
    durable_from_here = False
    for line in reversed(said):
        match line.split():
            case ["event", seq]:
                durable_from_here = True
                assert int(seq) in present
            case ["chunk", call_id, number]:
                is_there = bool(calls.load_chunks(tx, CallId(call_id), 1, from_number=int(number)))
                assert is_there or not durable_from_here, "a durable write left an earlier one behind"
                lost += not is_there
    return lost


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


# --- the harness itself -------------------------------------------------------------------------------------------

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
