"""Where a restored agent leaves the log's path: holds the call that would do it, as long as the policy wants.

Nothing of a held call is in the log: its request is not acknowledged, so whoever serves its stream next reads it again
and comes to the same place. A client that goes away while it is held has asked for nothing.
"""

import asyncio

from torpor.core.divergence import OnDivergence
from torpor.sandbox.streams import Stream, StreamGone


class Crossroads:
    """One session's, under its policy; `begin` it with each life of the sandbox.

    Args:
        let_go: a person has decided already that the session may go on.
    """

    def __init__(self, policy: OnDivergence, *, let_go: bool = False) -> None:
        self.policy = policy
        self._allowed = let_go
        self._decided = asyncio.Event()
        self._reached = asyncio.Event()
        self.what = ""

    def begin(self) -> None:
        """A new life: what the last one held is gone with it."""
        self._decided = asyncio.Event()
        self._reached.clear()

    @property
    def open(self) -> bool:
        """Whether a call may leave the path without asking."""
        return not self.policy.holds or self._allowed

    @property
    def holding(self) -> bool:
        """Whether a call is held."""
        return self._reached.is_set()

    async def reached(self) -> str:
        """Wait until a call is held; what it asks for."""
        await self._reached.wait()
        return self.what

    async def decided(self) -> None:
        """Wait until the held calls may go."""
        await self._decided.wait()

    def go_on(self) -> None:
        """Let the held calls go, and every later one of this node."""
        self._allowed = True
        self._reached.clear()
        self._decided.set()

    async def hold(self, stream: Stream, what: str) -> None:
        """Wait for the decision.

        Raises:
            StreamGone: the client, or the sandbox, did not wait for it.
        """
        self.what = what
        self._reached.set()
        async with asyncio.TaskGroup() as group:
            decided = group.create_task(self._decided.wait())
            left = group.create_task(_closed(stream))
            await asyncio.wait([decided, left], return_when=asyncio.FIRST_COMPLETED)
            decided.cancel()
            left.cancel()
        if not self._allowed:
            raise StreamGone(stream.id, "it did not wait until it was decided whether the agent may take another path")


async def _closed(stream: Stream) -> None:
    try:
        await stream.wait_closed()
    except StreamGone:
        return
