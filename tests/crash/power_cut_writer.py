"""A process that is recorded while it saves snapshots and commits checkpoints of them.

python -m tests.crash.power_cut_writer DIRECTORY
"""

import asyncio
import os
import sys
from dataclasses import replace
from pathlib import Path

from tests.unit.db.scene import NOW, new_scene
from tests.unit.snapshots.making import World, pages

from torpor.core.clock import SystemClock
from torpor.db import checkpoints, sessions
from torpor.db.database import open_database
from torpor.snapshots.store import SavedSnapshot

CHECKPOINTS = 6


async def main(directory: Path) -> None:
    said = os.open(directory / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    database = await open_database(f"sqlite://{directory}/torpor.db", clock=SystemClock())
    scene = await new_scene(database, "cut")
    world = World(directory)
    saved: SavedSnapshot | None = None
    for number in range(CHECKPOINTS):
        world.write_image(pages(range(number, number + 30)))
        (world.workspace / f"file{number}").write_bytes(b"%d" % number * 5000)
        saved = world.save(f"{number}", saved)
        seq = (await database.read(lambda tx: sessions.get(tx, scene.session_id))).head_seq
        point = replace(scene.checkpoint(number, seq), snapshot_id=saved.id, manifest_digest=saved.manifest_digest)
        await scene.write(
            lambda tx, point=point: checkpoints.commit(tx, **scene.owner, checkpoint=point, wall_ns=NOW),
            durable=True,
        )
        os.write(said, b"%d\n" % number)
    await database.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
