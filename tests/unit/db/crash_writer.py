"""A process that writes calls without end and says on stdout what was acknowledged to it, until someone kills it.

    python -m tests.unit.db.crash_writer URL SESSION_ID

Lines: `event SEQ` (durable) and `chunk CALL_ID NUMBER` (written, not synced), each after its commit.
"""

import asyncio
import sys
from collections.abc import Callable

from tests.unit.db.scene import HEAD, NOW, Scene, acquire, conversation

from torpor.core.clock import SystemClock
from torpor.core.ids import SessionId
from torpor.db import calls, sessions
from torpor.db.database import open_database


async def main(url: str, session_id: SessionId) -> None:
    database = await open_database(url, clock=SystemClock())
    seen = (await database.read(lambda tx: sessions.get(tx, session_id))).owner_token
    token = await database.write(lambda tx: acquire(tx, session_id, seen_token=seen), durable=True)
    scene = Scene(database, session_id, token)
    await database.write(lambda tx: calls.tear_open(tx, **scene.owner, wall_ns=NOW), durable=True)
    for turn in range(10_000):
        await one_call(scene, turn, say)


async def one_call(scene: Scene, turn: int, say: Callable[[str], None]) -> None:
    call = await scene.write(lambda tx: scene.intend(tx, conversation(turn)), durable=True)
    say(f"event {call.intended_seq}")
    call_id = call.call_id
    await scene.write(lambda tx: calls.mark_sent(tx, **scene.owner, call_id=call_id, wall_ns=NOW), durable=True)
    await scene.write(
        lambda tx: calls.record_head(tx, **scene.owner, call_id=call_id, attempt=1, head=HEAD, wall_ns=NOW)
    )
    for number in range(20):
        await scene.write(lambda tx, number=number: scene.add_chunks(tx, call_id, b"%d" % number, first=number))
        say(f"chunk {call_id} {number}")
    event = await scene.write(
        lambda tx: calls.complete(tx, **scene.owner, call_id=call_id, usage={}, wall_ns=NOW), durable=True
    )
    say(f"event {event.seq}")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], SessionId(sys.argv[2])))
