"""A power cut at any moment loses nothing that was acknowledged as durable, and leaves a log that verifies.

The record of processes that wrote calls is cut at many places; what was not synced by then is dropped, kept, or kept in
part at random (RECOVERY 6).
"""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.recorder import Recording, contents, record

from torpor.core.errors import NotFound
from torpor.core.ids import CallId
from torpor.db import calls, log, sessions, verify
from torpor.db.database import Transaction, open_database
from torpor.testing.clock import FakeClock
from torpor.testing.powercut import rebuild

CUTS = 40


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(tmp_path_factory.mktemp("powercut"), "-m", "tests.unit.db.power_cut_writer")


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
