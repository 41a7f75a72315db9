"""Carrying a redaction out, in an order that a kill may cut anywhere (docs/event-log.md, Redaction)."""

from collections.abc import Callable
from typing import Any

from torpor.core.clock import Clock
from torpor.core.crash import crash_point
from torpor.db import ahead, redaction, sessions
from torpor.db.ahead import Ahead
from torpor.db.database import Transaction
from torpor.runtime.home import Home

Find = Callable[[Transaction], redaction.Plan]


async def redact(owned: Ahead, find: Find, *, home: Home, clock: Clock) -> redaction.Plan:
    """Mask what `find` finds in a session that this process owns, for good, and let go of the session.

    Masks that are large first, then rows and event in one durable transaction, then what still holds the old bytes:
    objects of the store, the search index, the WAL. That is done also if nothing was found, after an earlier kill.
    """
    database = owned.database
    await owned.tear_open(wall_ns=clock.wall_ns())
    plan = await database.read(find)
    await owned.masks(plan)
    crash_point("redaction.stored")

    def work(tx: Transaction) -> None:
        wall_ns = clock.wall_ns()
        owner: dict[str, Any] = {"session_id": owned.session_id, "owner_token": owned.owner_token}
        if plan:
            redaction.apply(tx, **owner, plan=plan, wall_ns=wall_ns)
        sessions.release(tx, **owner, wall_ns=wall_ns)

    await database.write(work, durable=True)
    crash_point("redaction.committed")
    await ahead.sweep(database, owned.session_id)
    home.drop_search_index()
    await database.settle()
    return plan
