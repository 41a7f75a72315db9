"""`torpor rewind`: a session goes back to an earlier point. Order and crash points are in docs/forking.md.

What was done to the outside since then stays done. So a person sees it first (`look`), and what came to it while they
made up their mind refuses the rewind.
"""

from collections.abc import Collection
from dataclasses import dataclass

from torpor.core.checkpoint import Checkpoint
from torpor.core.crash import crash_point
from torpor.core.errors import Conflict
from torpor.core.ids import SessionId
from torpor.core.origin import Origin, Plan, plan, undone
from torpor.core.session import ENDED
from torpor.db import calls, rewinds
from torpor.db.ahead import Ahead
from torpor.db.database import Transaction
from torpor.db.rewinds import Orphans
from torpor.db.sleeping import NOW
from torpor.runtime import leasing
from torpor.runtime.origins import find_origin, number_of_turn
from torpor.runtime.runtime import Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way back.

    Attributes:
        turn: how many turns the session has behind it there.
        turns_left: how many it leaves.
        orphans: what stays done all the same.
    """

    origin: Origin
    plan: Plan
    turn: int
    turns_left: int
    orphans: Orphans

    @property
    def orphan_names(self) -> frozenset[str]:
        """What tells orphans apart."""
        sent = (f"message {message.number}" for message in self.orphans.sent)
        return frozenset([*sent, *(call.call_id for call in self.orphans.effects)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewound:
    way: Way
    checkpoint: Checkpoint


async def look(runtime: Runtime, session_id: SessionId, to: str) -> Way:
    """What a rewind would do.

    Raises:
        As `find_origin`; Conflict: `session_ended`.
    """
    session = await runtime.session(session_id)
    if session.status in ENDED:
        raise Conflict(
            "session_ended",
            f"cannot rewind session {session_id}: it has {session.status}",
            hint=f"`torpor fork {session_id} --at {to}` goes on from there.",
        )
    return await runtime.database.read(lambda tx: _way(tx, session_id, to))


async def rewind(
    runtime: Runtime,
    session_id: SessionId,
    to: str,
    me: leasing.Holder,
    answers: leasing.HolderAnswers,
    *,
    known: Collection[str] | None,
    goes_on: bool,
) -> Rewound:
    """Take back a session that no node runs.

    Args:
        goes_on: a node daemon is to run it then, as it did before.
        known: the orphans that a person agreed to; None: to all that there are.

    Raises:
        As `look`; Conflict: `session_running`; `rewind_orphans`, there are others by now.
    """
    async with runtime.freed(session_id, me, answers) as records:
        crash_point("rewind.freed")
        owned = Ahead(database=runtime.database, session_id=session_id, owner_token=records.owner_token)
        await owned.tear_open(wall_ns=runtime.clock.wall_ns())
        way = await look(runtime, session_id, to)
        if known is not None and not way.orphan_names <= frozenset(known):
            raise orphaned(session_id, way.orphans)
        checkpoint = await records.rewind(way.origin, way.plan, wake_ns=NOW if goes_on else None)
        crash_point("rewind.committed")
    return Rewound(way=way, checkpoint=checkpoint)


def orphaned(session_id: SessionId, orphans: Orphans) -> Conflict:
    """What a rewind says that nobody has agreed to."""
    what = [f"{len(orphans.sent)} messages out"] if orphans.sent else []
    what += [f"{len(orphans.effects)} requests that may have changed something"] if orphans.effects else []
    return Conflict(
        "rewind_orphans",
        f"cannot rewind session {session_id}: {' and '.join(what)} would stay done",
        hint="--yes goes back all the same.",
    )


def _way(tx: Transaction, session_id: SessionId, to: str) -> Way:
    origin = find_origin(tx, session_id, to, branches=False, pump_alive=lambda _: False)
    made = {call.call_id: call for call in calls.load_calls(tx, session_id)}
    past = rewinds.past_of(tx, session_id)
    origin = Origin(checkpoint=past.point(origin.checkpoint), past_seq=origin.past_seq, turn=origin.turn)
    planned = plan(origin, made, past.timeline, resample=True)
    left = undone(origin, made.values(), past.timeline, planned.kept)
    return Way(
        origin=origin,
        plan=planned,
        turn=number_of_turn(tx, session_id, origin.past_seq) + (origin.turn is not None),
        turns_left=sum(call.is_llm for call in left),
        orphans=rewinds.list_orphans(tx, session_id, origin, planned),
    )
