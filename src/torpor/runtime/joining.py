"""The answers that a fork's calls get from its parent: copied when they are whole, before the fork lives.

The agent has asked already, and waits. So its session waits with it, as long as the answer is on its way to the parent;
an answer that never comes there is asked for by the fork itself, as by any session whose call was never sent.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from torpor.core.call import CallState
from torpor.core.crash import crash_point
from torpor.core.errors import Damaged, NotFound
from torpor.db import calls, copies
from torpor.db.copies import Answer, Joining
from torpor.db.database import Transaction
from torpor.runtime.home import Home
from torpor.runtime.leasing import is_held
from torpor.runtime.records import Records

LOOK_SECONDS = 0.25

Aside = Callable[[], AbstractAsyncContextManager[None]]
"""What a session stands in as long as it waits for another one."""


async def take_answers(records: Records, home: Home, notice: Callable[[str], None], aside: Aside) -> None:
    """Give each call of the session that joins one of its parent the answer, if that has one or is getting one.

    Args:
        aside: it is in there as long as it waits for an answer.

    Raises:
        Superseded: this node lost the session.
    """
    for joining in await records.database.read(lambda tx: copies.list_joining(tx, records.session_id)):
        answer = await _await_answer(records, home, joining, notice, aside)
        if answer is None or joining.attempt not in {None, answer.attempt.number}:
            continue  # The fork sends the call itself, or its agent has a part of an answer that nobody goes on with.

        def take(tx: Transaction, joining: Joining = joining, answer: Answer = answer) -> None:
            records.take_answer(tx, joining, answer)

        await records.database.write(take, durable=True)
        crash_point("fork.joined")


async def _await_answer(
    records: Records, home: Home, joining: Joining, notice: Callable[[str], None], aside: Aside
) -> Answer | None:
    answer, may_come = await _look(records, home, joining)
    if may_come:
        notice(f"waiting for the answer that {joining.parent_id} is getting")
        async with aside():
            while may_come:
                # The parent's log is written by another process, which has no way to call us: look again.
                await asyncio.sleep(LOOK_SECONDS)
                answer, may_come = await _look(records, home, joining)
    return answer


async def _look(records: Records, home: Home, joining: Joining) -> tuple[Answer | None, bool]:
    """The parent's answer if it is whole, else whether it may come."""
    # Before the row: a node that has ended by now wrote the answer before it did.
    is_run = is_held(home.lock(joining.parent_id))
    answer, is_arriving = await records.database.read(lambda tx: _read(tx, joining))
    return answer, answer is None and is_arriving and is_run


def _read(tx: Transaction, joining: Joining) -> tuple[Answer | None, bool]:
    """The parent's answer if it is whole, and whether its call is on its way."""
    try:
        call = calls.load_call(tx, joining.parent_call)
        return copies.read_answer(tx, call), call.state is CallState.SENT
    except (NotFound, Damaged):
        return None, False
