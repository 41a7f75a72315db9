"""A power cut at any moment leaves no row that names a blob which is not whole: the store reaches the disk first."""

import random
from pathlib import Path

import pytest
import zstandard
from tests.crash.power_cut_blob_writer import EVENTS_TOLD, SECRET
from tests.recorder import Recording, record

from torpor.core.errors import NotFound
from torpor.core.ids import SessionId
from torpor.db import blobs, log, sessions, verify
from torpor.db.database import Transaction, open_database
from torpor.snapshots.backend import LocalDirectory
from torpor.testing.clock import FakeClock
from torpor.testing.powercut import rebuild

CUTS = 25


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(tmp_path_factory.mktemp("powercut"), "-m", "tests.crash.power_cut_blob_writer")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kept", ["nothing", "some"])
async def test_power_cut_leaves_no_row_without_its_blob(recording: Recording, tmp_path: Path, kept: str) -> None:
    chance = random.Random(kept)
    cuts = recording.acknowledgements + chance.sample(range(len(recording.operations) + 1), CUTS)
    read = 0
    for number, cut in enumerate(sorted(cuts)):
        share = chance.random() if kept == "some" else 0.0
        directory = tmp_path / str(number)
        rebuild(recording.operations[:cut], recording.root, directory, lambda share=share: chance.random() < share)
        read += await check(directory, recording.said_before(cut))
    print(f"{len(recording.operations)} operations, {len(cuts)} cuts, {read} blobs read")
    assert read > CUTS


async def check(directory: Path, said: list[str]) -> int:
    """Every blob that a row names is there and whole; what was acknowledged holds. Gives how many were named."""
    store = LocalDirectory(directory / "store")
    database = await open_database(f"sqlite://{directory}/torpor.db", clock=FakeClock(), blobs=store)
    try:
        await database.read(lambda tx: check_rows(tx, said))
        named = await database.read(blobs.list_named)
    finally:
        await database.close()
    there = set(store.list("blobs/"))
    assert named <= there
    for line in said:
        match line.split():
            case ["forgotten", session_id]:
                assert store.list(blobs.prefix_of(SessionId(session_id))) == []
            case ["redacted"]:
                assert named == there
                assert not any(SECRET in unpacked(store.get(key)) for key in there)
            case _:
                pass
    return len(named)


def check_rows(tx: Transaction, said: list[str]) -> None:
    for name in ("doomed", "cut"):
        told = {int(line.split()[2]) for line in said if line.startswith(f"event {name} ")}
        try:
            session = sessions.find(tx, name)
        except NotFound:
            assert not told or (name == "doomed" and len(told) == EVENTS_TOLD)
            continue
        assert verify.verify_chain(tx, session.session_id) == []
        assert told <= {event.seq for event in log.events(tx, session.session_id)}


def unpacked(content: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(content)
