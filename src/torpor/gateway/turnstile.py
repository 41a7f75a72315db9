"""Decisions about a session's streams, one at a time; the rows of those that concern nobody else need not be awaited.

Whoever has the turn decides on what the memory says, and the log has to tell the same story (decision 0032). Once it is
clear that nobody's decision can depend on the outcome, it steps aside: the next decide meanwhile, and the database,
which writes in the order in which it is asked, commits them together. `alone` waits for all that stepped aside.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from torpor.sandbox.fifos import Pulse


class Turnstile:
    """One session's."""

    def __init__(self) -> None:
        self._deciding = asyncio.Lock()
        self._aside = 0
        self._changed = Pulse()

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator["Turn"]:
        """Decide: nobody else does until the end, or until `step_aside`."""
        turn = Turn(self)
        await self._deciding.acquire()
        try:
            yield turn
        finally:
            self._end(turn)

    @asynccontextmanager
    async def alone(self) -> AsyncGenerator[None]:
        """Nothing is being decided, and every decision has its rows."""
        async with self._deciding:
            await self.others()
            yield

    async def others(self) -> None:
        """With the turn: wait for all that stepped aside."""
        while self._aside:
            await self._changed.wait()

    def step_aside(self, turn: "Turn") -> None:
        if not turn.is_aside:
            turn.is_aside = True
            self._aside += 1
            self._deciding.release()

    def _end(self, turn: "Turn") -> None:
        if turn.is_aside:
            self._aside -= 1
            self._changed.fire()
        else:
            self._deciding.release()


class Turn:
    """One decision that is being made."""

    def __init__(self, turnstile: Turnstile) -> None:
        self.is_aside = False
        self._turnstile = turnstile

    def step_aside(self) -> None:
        """Let others decide: none of them can depend on what follows of this decision."""
        self._turnstile.step_aside(self)

    async def alone(self) -> None:
        """Wait for the decisions that stepped aside: this one may depend on them, or they on it."""
        await self._turnstile.others()
