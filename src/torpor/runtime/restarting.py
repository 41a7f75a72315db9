"""Begins an agent that failed again: decides by `core.restart`, and makes that durable.

Order, and what a kill -9 leaves:

    the agent exits                the sandbox, whose init holds the exit status: the next node decides
    agent.restarted (`restart.decided`)
                                   the same sandbox: the next node adopts it, finds the event of its incarnation, and
                                   goes on here; or none: it restores, by the same rules
    the sandbox is destroyed       a session to recover
    a checkpoint is restored       a life like any other

The exit is never acknowledged, so init keeps it until its sandbox is gone.
"""

import os
import signal
from collections.abc import Mapping

from torpor.core.crash import crash_point
from torpor.core.events import Event, EventDraft, Kind
from torpor.core.restart import Restart, failing_turn, restarts_in_a_row, still_restore, why_not
from torpor.db import log
from torpor.db.database import Transaction
from torpor.runtime.records import Records
from torpor.runtime.watcher import Watcher
from torpor.sandbox.link import Link


async def load_restarts(records: Records) -> list[Restart]:
    """The session's restarts so far, oldest first."""

    def work(tx: Transaction) -> list[Event]:
        return log.all_of_kind(tx, records.session_id, Kind.AGENT_RESTARTED)

    return [
        Restart(incarnation=event.incarnation, seq=event.seq, failed_seq=event.data["failed_seq"])
        for event in await records.database.read(work)
    ]


class Restarting:
    """One session's policy.

    Args:
        restarts_max: in a row; 0: an agent that fails has failed.
    """

    def __init__(self, *, records: Records, restarts_max: int, watcher: Watcher) -> None:
        self._records = records
        self._restarts_max = restarts_max
        self._watcher = watcher

    async def decide(self, incarnation: int, link: Link) -> bool:
        """Whether the agent of this life, which has exited, begins again: durable when this returns."""
        wait_status = await link.wait_exit()
        exit_status, described = exit_code(wait_status), describe_exit(wait_status)
        restarts = await load_restarts(self._records)
        if any(restart.incarnation == incarnation for restart in restarts):
            return True  # The last node decided, and died before it had destroyed the sandbox.
        calls = list((await self._records.calls()).values())
        refusal = why_not(exit_status, self._restarts_max, calls, restarts)
        if refusal is not None:
            if refusal:
                self._watcher.notice(f"not restarted: {refusal}")
            return False
        head = (await self._records.position())[0]
        turn = failing_turn(calls, restarts)
        failed_seq = head + 1 if turn is None else turn
        candidate = Restart(incarnation=incarnation, seq=head + 1, failed_seq=failed_seq)
        if not still_restore(await self._records.checkpoints(), [*restarts, candidate]):
            self._watcher.notice("not restarted: no checkpoint is left from before the turn that failed")
            return False
        number = restarts_in_a_row(calls, restarts) + 1
        data = {**described, "restart": number, "restarts_max": self._restarts_max, "failed_seq": failed_seq}
        await self._records.append(EventDraft(kind=Kind.AGENT_RESTARTED, incarnation=incarnation, data=data))
        crash_point("restart.decided")
        self._watcher.notice(
            f"the agent exited with {exit_status}: restart {number} of {self._restarts_max}, from before its last turn"
        )
        return True


def exit_code(wait_status: int) -> int:
    """The exit status of the agent as a shell gives it: 128 + n for a signal."""
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


def describe_exit(wait_status: int) -> Mapping[str, object]:
    """The agent's exit for its event."""
    code = os.waitstatus_to_exitcode(wait_status)
    if code >= 0:
        return {"exit_status": code}
    return {"exit_status": 128 - code, "signal": signal.Signals(-code).name}
