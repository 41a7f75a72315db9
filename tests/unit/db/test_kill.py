"""kill -9 of a writer at any moment loses nothing that was acknowledged and never breaks the chain."""

import asyncio
import random
import sys
from pathlib import Path

import pytest
from tests.unit.db.scene import new_scene

from torpor.core.ids import CallId, SessionId
from torpor.db import calls, log, verify
from torpor.db.database import Transaction, open_database
from torpor.testing.clock import FakeClock

KILLS = 15
REPOSITORY = Path(__file__).parents[3]


@pytest.mark.timeout(300)
async def test_killed_writer_loses_no_acknowledged_row(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/torpor.db"
    database = await open_database(url, clock=FakeClock())
    scene = await new_scene(database)
    chance = random.Random(7)
    events: set[int] = set()
    chunks: dict[CallId, int] = {}
    for _ in range(KILLS):
        for line in await write_until_killed(url, scene.session_id, chance):
            match line.split():
                case ["event", seq]:
                    events.add(int(seq))
                case ["chunk", call_id, number]:
                    chunks[CallId(call_id)] = int(number) + 1

        def check(tx: Transaction) -> None:
            assert verify.verify_chain(tx, scene.session_id) == []
            assert events <= {event.seq for event in log.events(tx, scene.session_id)}
            for call_id, count in chunks.items():
                found = calls.load_chunks(tx, call_id, 1)
                assert len(found) >= count
                assert [chunk.data for chunk in found] == [b"%d" % number for number in range(len(found))]

        await database.read(check)
    print(f"{KILLS} kills, {len(events)} events and {sum(chunks.values())} chunks acknowledged")
    await database.close()


async def write_until_killed(url: str, session_id: SessionId, chance: random.Random) -> list[str]:
    """Start a writer, kill it at some moment after some acknowledgement, and return all that it was told."""
    writer = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.unit.db.crash_writer",
        url,
        session_id,
        stdout=asyncio.subprocess.PIPE,
        cwd=REPOSITORY,
    )
    assert writer.stdout is not None
    said = [await writer.stdout.readline() for _ in range(chance.randrange(1, 60))]
    await asyncio.sleep(chance.random() * 0.01)  # the moment is what varies; nothing waits for it
    writer.kill()
    said += (await writer.stdout.read()).splitlines(keepends=True)
    assert await writer.wait() == -9
    return [line.decode() for line in said if line.endswith(b"\n")]
