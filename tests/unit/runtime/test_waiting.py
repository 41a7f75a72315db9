"""A session that waits for two things runs again when both are there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torpor.core.ids import NodeId, new_session_id
from torpor.core.session import SessionStatus
from torpor.core.waitpoint import WaitpointKind
from torpor.db import sessions, waitpoints
from torpor.db.database import Transaction, open_database
from torpor.runtime.records import Records
from torpor.testing.clock import FakeClock

CLOCK = FakeClock()


async def test_who_is_let_go_at_a_crossroads_still_waits_for_the_budget(tmp_path: Path) -> None:
    session_id = new_session_id(CLOCK.wall_ns())
    database = await open_database(f"sqlite://{tmp_path / 'torpor.db'}", clock=CLOCK)

    def begin(tx: Transaction) -> int:
        new = sessions.create(tx, session_id=session_id, name=None, spec={}, wall_ns=1, budget_nanousd=1)
        node: dict[str, Any] = {"node_id": NodeId("node_test"), "boot_id": "boot", "pid": 1}
        return sessions.acquire(tx, session_id=session_id, seen_token=new.owner_token, **node, wall_ns=1)

    async def write(work: Callable[..., object], **arguments: Any) -> None:
        held = {"session_id": session_id, "owner_token": token, "wall_ns": 2}
        await database.write(lambda tx: work(tx, **held, **arguments), durable=True)

    try:
        token = await database.write(begin, durable=True)
        records = Records(database=database, session_id=session_id, owner_token=token, clock=CLOCK)
        await records.set_status(SessionStatus.RUNNING)
        await records.wait("another path")
        await write(waitpoints.wait_on, kind=WaitpointKind.BUDGET, call_id=None, data={})
        await records.go_on("let go")
        assert (await records.session()).status is SessionStatus.WAITING
        await write(waitpoints.resolve_all, kind=WaitpointKind.BUDGET, resolution={})
        assert (await records.session()).status is SessionStatus.RUNNING
    finally:
        await database.close()


async def test_a_session_on_its_way_to_sleep_does_not_begin_to_wait(tmp_path: Path) -> None:
    session_id = new_session_id(CLOCK.wall_ns())
    database = await open_database(f"sqlite://{tmp_path / 'torpor.db'}", clock=CLOCK)
    try:
        new = await database.write(
            lambda tx: sessions.create(tx, session_id=session_id, name=None, spec={}, wall_ns=1), durable=True
        )
        records = Records(database=database, session_id=session_id, owner_token=new.owner_token, clock=CLOCK)
        await records.set_status(SessionStatus.RUNNING)
        await records.set_status(SessionStatus.HIBERNATING)
        await records.wait("another path")
        await records.go_on("let go")
        assert (await records.session()).status is SessionStatus.HIBERNATING
    finally:
        await database.close()
