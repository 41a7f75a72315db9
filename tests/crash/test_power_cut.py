"""A power cut at any moment leaves every committed checkpoint restorable: the store reaches the disk before the log."""

import random
from pathlib import Path

import pytest
from tests.recorder import Recording, record
from tests.unit.snapshots.making import IDS, KEY, page

from torpor.core.errors import NotFound
from torpor.db import checkpoints, sessions, verify
from torpor.db.database import Transaction, open_database
from torpor.snapshots.backend import LocalDirectory
from torpor.snapshots.manifest import SnapshotRef
from torpor.snapshots.store import SnapshotStore
from torpor.testing.clock import FakeClock
from torpor.testing.powercut import rebuild

CUTS = 60


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(tmp_path_factory.mktemp("powercut"), "-m", "tests.crash.power_cut_writer")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kept", ["nothing", "some"])
async def test_power_cut_leaves_each_committed_checkpoint_restorable(
    recording: Recording, tmp_path: Path, kept: str
) -> None:
    chance = random.Random(kept)
    cuts = recording.acknowledgements + chance.sample(range(len(recording.operations) + 1), CUTS)
    restored = 0
    for number, cut in enumerate(sorted(cuts)):
        share = chance.random() if kept == "some" else 0.0
        directory = tmp_path / str(number)
        rebuild(recording.operations[:cut], recording.root, directory, lambda share=share: chance.random() < share)
        restored += await check(directory, told=len(recording.said_before(cut)))
    print(f"{len(recording.operations)} operations, {len(cuts)} cuts, {restored} checkpoints restored")
    assert restored > CUTS


async def check(directory: Path, *, told: int) -> int:
    """Every checkpoint that the log has restores, and the log has those that were acknowledged."""
    database = await open_database(f"sqlite://{directory}/torpor.db", clock=FakeClock())
    try:
        points = await database.read(intact_points)
    finally:
        await database.close()
    assert len(points) >= told
    store = SnapshotStore(LocalDirectory(directory / "store"), IDS)
    for point in points:
        assert store.verify(ref_of(point)) == []
    if points:
        target = directory / "restored"
        store.restore_image(ref_of(points[-1]), target)
        assert (target / "pages.img").read_bytes().startswith(page(points[-1].number))
    return len(points)


def ref_of(point: checkpoints.Checkpoint) -> SnapshotRef:
    return SnapshotRef(id=point.snapshot_id, manifest_digest=point.manifest_digest, key=KEY)


def intact_points(tx: Transaction) -> list[checkpoints.Checkpoint]:
    try:
        session = sessions.find(tx, "cut")
    except NotFound:
        return []
    assert verify.verify_chain(tx, session.session_id) == []
    return checkpoints.list_intact(tx, session.session_id)
