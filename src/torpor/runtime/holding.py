"""Sessions for a moment, one after the other: what `collect` needs of each. It waits for nobody and kills nobody."""

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import Any

from torpor.core.clock import Clock
from torpor.core.errors import Conflict
from torpor.core.ids import SessionId
from torpor.db import sessions
from torpor.db.database import Database
from torpor.runtime import leasing
from torpor.runtime.home import Home
from torpor.runtime.records import Records

Ask = Callable[..., Awaitable[dict[str, Any]]]
"""Ask a node: its socket, a verb, `deadline_seconds`, and the verb's own arguments."""

_DEADLINE_SECONDS = 30.0


class Holding:
    """Takes sessions that nobody has, and asks the nodes of the others."""

    def __init__(self, *, home: Home, database: Database, me: leasing.Holder, ask: Ask, clock: Clock) -> None:
        self._home = home
        self._database = database
        self._me = me
        self._ask = ask
        self._clock = clock

    def is_run(self, session_id: SessionId) -> bool:
        """Whether a node has it now."""
        return leasing.is_held(self._home.lock(session_id))

    async def ask(self, session_id: SessionId, verb: str, **arguments: object) -> dict[str, Any] | None:
        """The answer of the node that has the session; None if none has it, or it does not answer."""
        holder = leasing.read_holder(self._home.lock(session_id)) if self.is_run(session_id) else None
        if holder is None:
            return None
        with contextlib.suppress(OSError, TimeoutError, Conflict):
            return await self._ask(
                holder.socket, verb, deadline_seconds=_DEADLINE_SECONDS, session=session_id, **arguments
            )
        return None

    @contextlib.contextmanager
    def locked(self, session_id: SessionId) -> Generator[bool]:
        """Keep nodes away from a session, which need not exist; False if one has it."""
        lock = leasing.acquire_free_lock(self._home.lock(session_id), self._me)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    @contextlib.asynccontextmanager
    async def owned(self, session_id: SessionId) -> AsyncGenerator[Records | None]:
        """Own a session that nobody runs; None if a node does.

        Raises:
            Superseded, NotFound: it was removed at that moment.
        """
        with self.locked(session_id) as is_mine:
            if not is_mine:
                yield None
                return
            seen = await self._database.read(lambda tx: sessions.get(tx, session_id))
            token = await self._database.write(
                lambda tx: leasing.acquire(tx, seen, self._me, wall_ns=self._clock.wall_ns()), durable=False
            )
            records = Records(database=self._database, session_id=session_id, owner_token=token, clock=self._clock)
            yield records
            await records.release()
