"""Keeps a sandbox within its memory: at a high-water mark its session is checkpointed and parked until it gets more.

The limit is enforced from outside, by measuring: nothing of the agent is asked, and no privilege is needed. Where the
machine lets us, a wall stands behind it (sandbox/cgroups.py): an agent that takes more than what is left of its limit
between two looks is killed by the kernel, and its session is parked at the last checkpoint. Order, and what a kill -9
leaves:

    memory.exceeded (`memory.exceeded`)  a session to recover: its sandbox is adopted, and found too large again; one
                                         that was killed is restored, and comes to its wall again
    status `hibernating`, the last cut   as at every stop
    status `asleep` (`session.asleep`)   a paused sandbox; the next owner kills it
    the sandbox is destroyed             a session that sleeps, and is not woken without more memory

If no checkpoint can be made (the image of what is too large may itself find no room) it sleeps at the one before, and
what was answered since comes from the log.
"""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack

from torpor.core.crash import crash_point
from torpor.core.errors import Conflict
from torpor.core.events import Event, EventDraft, Kind
from torpor.core.memory import mark_of, told, wall_of
from torpor.core.session import SessionStatus
from torpor.db import log, sessions
from torpor.db.database import Transaction
from torpor.db.sessions import Session
from torpor.runtime.checkpointing import Checkpointer
from torpor.runtime.incarnation import Incarnation
from torpor.runtime.records import Records
from torpor.runtime.watcher import Watcher

LOOK_SECONDS = 0.5


class Memory:
    """One session's limit."""

    def __init__(self, *, records: Records, checkpointer: Checkpointer, watcher: Watcher) -> None:
        self._records = records
        self._checkpointer = checkpointer
        self._watcher = watcher
        self._used_bytes = 0

    async def check_enough(self) -> None:
        """Refuse to wake a session that would be parked at once.

        Raises:
            Conflict: `memory_too_small`.
        """
        limit, parked = await self._limit()
        if (await self._records.session()).status is not SessionStatus.ASLEEP or parked is None or limit is None:
            return
        used = parked.data["used_bytes"]
        if used >= mark_of(limit):
            raise Conflict(
                "memory_too_small",
                f"cannot wake session {self._records.session_id}: it takes {told(used)}, and may take {told(limit)}",
                hint=f"Give it more: torpor resume --memory {max(1, -(-2 * used >> 30))}G SESSION.",
            )

    async def until_full(self, life: Incarnation) -> None:
        """Wait until the sandbox takes so much that it has to be parked, or was killed; for ever without a limit."""
        limit, _ = await self._limit()
        while limit is not None:
            if await asyncio.to_thread(life.sandbox.was_killed_at_wall):
                return
            used = await asyncio.to_thread(life.sandbox.memory_bytes)
            if used is None:
                self._watcher.notice("its memory cannot be measured here: --memory has no effect")
                break
            self._used_bytes = used
            if used >= mark_of(limit):
                return
            await asyncio.to_thread(life.sandbox.allow_memory, wall_of(limit))
            # The kernel tells nobody how large a file in memory has become.
            await asyncio.sleep(LOOK_SECONDS)
        await asyncio.Event().wait()

    async def park(self, life: Incarnation) -> None:
        """Checkpoint the session and let it sleep; its sandbox is the caller's to destroy."""
        if await self.park_if_killed(life):
            return
        limit, _ = await self._limit()
        assert limit is not None, "it was exceeded"
        reason = f"it takes {told(self._used_bytes)}, and may take {told(limit)}"
        await self._exceeded(life, reason, {"used_bytes": self._used_bytes, "limit_bytes": limit})
        async with AsyncExitStack() as still:
            made = await self._checkpointer.take_last("memory", still)
            await self._records.park(reason)
            crash_point("session.asleep")
            still.pop_all()
        since = "" if made is not None else ", at an earlier checkpoint, since none could be made"
        self._watcher.notice(f"parked{since}: {reason}; `torpor resume --memory SIZE` gives it more")

    async def park_if_killed(self, life: Incarnation) -> bool:
        """If the sandbox was killed at its wall, let the session sleep at its last checkpoint, and not try it again."""
        limit, _ = await self._limit()
        if limit is None or not await asyncio.to_thread(life.sandbox.was_killed_at_wall):
            return False
        await self._checkpointer.settle()
        reason = f"it took more than {told(limit)} at once, and was killed"
        used_bytes = max(limit, self._used_bytes)  # How much it wanted is not known.
        await self._exceeded(life, reason, {"used_bytes": used_bytes, "limit_bytes": limit, "killed": True})
        await self._records.park(reason)
        crash_point("session.asleep")
        self._watcher.notice(f"parked at its last checkpoint: {reason}; `torpor resume --memory SIZE` gives it more")
        return True

    async def _exceeded(self, life: Incarnation, reason: str, data: Mapping[str, object]) -> None:
        """Say it once for each life: it may die of that while it is being parked, and is parked for its death then."""
        _, said = await self._limit()
        if said is None or said.incarnation != life.number:
            await self._records.append(EventDraft(kind=Kind.MEMORY_EXCEEDED, incarnation=life.number, data=data))
        crash_point("memory.exceeded")
        await self._records.set_status(SessionStatus.HIBERNATING, reason)

    async def _limit(self) -> tuple[int | None, Event | None]:
        """The limit, and the event that says by how much it was exceeded, unless it was changed since."""

        def work(tx: Transaction) -> tuple[int | None, Event | None]:
            session_id = self._records.session_id
            return limit_of(tx, sessions.get(tx, session_id)), log.last_of_kind(tx, session_id, Kind.MEMORY_EXCEEDED)

        return await self._records.database.read(work)


def limit_of(tx: Transaction, session: Session) -> int | None:
    """What the session's sandbox may take, in bytes, as it was made or as it was given since; None: no limit."""
    changed = log.last_of_kind(tx, session.session_id, Kind.MEMORY_CHANGED)
    limit: int | None = session.spec.get("memory_bytes_max") if changed is None else changed.data["limit_bytes"]
    return limit
