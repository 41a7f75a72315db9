"""Where sessions are now: the nodes that have them, and what of their memory is where."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torpor import wire
from torpor.core.errors import Conflict
from torpor.core.ids import SessionId
from torpor.core.session import ENDED, MAY_HOLD_SANDBOX, SessionStatus
from torpor.db.sessions import Session
from torpor.runtime.image_cache import staging_directory
from torpor.runtime.leasing import Holder, is_held, read_holder
from torpor.runtime.reader import Reader
from torpor.runtime.staging import Staging

ANSWER_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """See the module."""

    holders: Mapping[SessionId, Holder]
    tiers: Mapping[SessionId, str]

    def node(self, session: Session) -> str:
        """The process that runs a session, or that there ought to be one."""
        holder = self.holders.get(session.session_id)
        if holder is not None:
            return f"pid {holder.pid}"
        return "none: resume it" if session.status in MAY_HOLD_SANDBOX else ""

    def tier(self, session: Session) -> str | None:
        """Where its memory is, from the quickest to go on with: sandbox, paused, ready, memory, store."""
        if session.status in ENDED:
            return None
        return "sandbox" if session.status in MAY_HOLD_SANDBOX else self.tiers.get(session.session_id, "store")


async def look_around(reader: Reader, found: Sequence[Session]) -> Whereabouts:
    """Look for all of these sessions, and ask each node once."""
    holders: dict[SessionId, Holder] = {}
    for session in found:
        # Whoever has one for longer than a moment says so in its row.
        lock = reader.home.lock(session.session_id)
        holder = read_holder(lock) if session.lease is not None and is_held(lock) else None
        if holder is not None:
            holders[session.session_id] = holder
    asleep = {session.session_id for session in found if session.status is SessionStatus.ASLEEP}
    staged = staging_directory(reader.home.root)
    names = {path.name for path in staged.iterdir()} & asleep if staged.is_dir() else set[str]()
    tiers = {SessionId(name): "memory" for name in names if Staging(reader.home.root, SessionId(name)).images()}
    sockets = {holder.socket for session_id, holder in holders.items() if session_id in asleep}
    for told in await asyncio.gather(*map(_tiers, sockets)):
        tiers |= {SessionId(session_id): tier for session_id, tier in told.items()}
    return Whereabouts(holders=holders, tiers=tiers)


async def _tiers(socket: Path) -> dict[str, str]:
    """What a node says of the sleeping sessions that it has; nothing, if it is just ending."""
    with contextlib.suppress(OSError, TimeoutError, Conflict):
        return await wire.ask(socket, "tiers", deadline_seconds=ANSWER_SECONDS)
    return {}
