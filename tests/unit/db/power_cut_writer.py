"""A process that is recorded while it creates a database and writes calls; what it was told is a file beside it.

    python -m tests.unit.db.power_cut_writer DIRECTORY [dying]

It has several lives, each closing the database in order. Between them another process opens it, writes without a sync,
and dies: what the next one makes durable must not lean on anything that only the dead one had yet to sync.
"""

import asyncio
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

from tests.unit.db.crash_writer import one_call
from tests.unit.db.scene import Scene, new_scene

from torpor.core.clock import SystemClock
from torpor.db import sessions
from torpor.db.database import open_database

LIVES = 4
CALLS_PER_LIFE = 3


def url(directory: Path) -> str:
    return f"sqlite://{directory}/home/torpor.db"


async def live(directory: Path, life: int, say: Callable[[str], None]) -> None:
    database = await open_database(url(directory), clock=SystemClock())
    if life == 0:
        scene = await new_scene(database, "cut")
        say("event 1")
    else:
        session = await database.read(lambda tx: sessions.find(tx, "cut"))
        scene = Scene(database, session.session_id, session.owner_token)
    for turn in range(CALLS_PER_LIFE):
        await one_call(scene, turn, say)
    unsynced = await scene.write(lambda tx: scene.intend(tx))
    await scene.write(lambda _: None, durable=True)  # nothing of its own, and yet all before it is durable now
    say(f"event {unsynced.intended_seq}")
    if life == 1:  # enough for SQLite to move its WAL into the database and begin it anew
        noise = random.Random(1).randbytes(5_000_000)
        await scene.write(lambda tx: scene.intend(tx, noise), durable=True)
        await one_call(scene, CALLS_PER_LIFE, say)
    await database.close()


async def die(directory: Path) -> None:
    database = await open_database(url(directory), clock=SystemClock())
    session = await database.read(lambda tx: sessions.find(tx, "cut"))
    scene = Scene(database, session.session_id, session.owner_token)
    await scene.write(lambda tx: scene.send(tx))
    os._exit(0)


async def main(directory: Path) -> None:
    said = os.open(directory / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for life in range(LIVES):
        await live(directory, life, lambda line: os.write(said, f"{line}\n".encode()))
        dying = await asyncio.create_subprocess_exec(sys.executable, "-m", __spec__.name, directory, "dying")
        assert await dying.wait() == 0


if __name__ == "__main__":
    asyncio.run((die if "dying" in sys.argv else main)(Path(sys.argv[1])))
