"""A process that is recorded while it writes large bodies, redacts one and forgets the session of another.

    python -m tests.crash.power_cut_blob_writer DIRECTORY

It says `event NAME SEQ` when an event is durable, `redacted` and `forgotten SESSION_ID` when that is done.
"""

import asyncio
import os
import re
import sys
from pathlib import Path

from tests.unit.db.blob_scene import MIB, BlobScene, noise, told
from tests.unit.db.scene import NOW, new_scene

from torpor.core.clock import SystemClock
from torpor.db import ahead, log, redaction, sessions
from torpor.db.database import open_database
from torpor.snapshots.backend import LocalDirectory

SECRET = b"sk-planted-0123456789abcdef"
TURNS = 2
EVENTS_TOLD = 2 * TURNS
"""Of each session."""


async def main(directory: Path) -> None:
    said = os.open(directory / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(line: str) -> None:
        os.write(said, f"{line}\n".encode())

    store = LocalDirectory(directory / "store")
    database = await open_database(f"sqlite://{directory}/torpor.db", clock=SystemClock(), blobs=store)
    for name in ("doomed", "cut"):
        made = await new_scene(database, name)
        scene = BlobScene(database, made.session_id, made.owner_token)
        for turn in range(TURNS):
            await scene.ask(told(SECRET + noise(3 * MIB // 2, turn)))
            say(f"event {name} {await head(scene)}")
            call_id = await scene.arriving(noise(MIB, turn), noise(MIB, turn + 5) + SECRET)
            await scene.end(call_id)
            say(f"event {name} {await head(scene)}")
            await scene.ahead.drop_chunks(call_id, 1)
        if name == "doomed":
            await scene.write(lambda tx, owner=scene.owner: sessions.forget(tx, **owner), durable=True)
            await ahead.sweep(database, scene.session_id)
            say(f"forgotten {scene.session_id}")
    plan = await database.read(lambda tx: redaction.plan_pattern(tx, scene.session_id, re.compile(SECRET)))
    await scene.ahead.masks(plan)
    await scene.write(lambda tx: redaction.apply(tx, **scene.owner, plan=plan, wall_ns=NOW), durable=True)
    await ahead.sweep(database, scene.session_id)
    await database.settle()
    say("redacted")
    await database.close()


async def head(scene: BlobScene) -> int:
    return (await scene.read(lambda tx: log.events(tx, scene.session_id)))[-1].seq


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
