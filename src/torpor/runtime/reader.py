"""Reads the rows of sessions: nothing that runs one, keeps its snapshots or talks to a provider is imported for it.

`Runtime` is a reader that can do all the rest; importing that takes longer than most commands that only read.
"""

import contextlib
from collections.abc import AsyncGenerator, Mapping

from torpor.config import torpor_home
from torpor.core.clock import Clock
from torpor.db import sessions
from torpor.db.database import Database, open_database
from torpor.runtime.home import Home


class Reader:
    """One process's view of TORPOR_HOME. Build it with `open_reader`."""

    def __init__(self, *, home: Home, database: Database, clock: Clock) -> None:
        self.home = home
        self.database = database
        self.clock = clock

    async def session(self, text: str) -> sessions.Session:
        """Find a session by id, unique beginning of an id, or name."""
        return await self.database.read(lambda tx: sessions.find(tx, text))


@contextlib.asynccontextmanager
async def open_reader(environment: Mapping[str, str], clock: Clock) -> AsyncGenerator[Reader]:
    """Open TORPOR_HOME, making it if need be, without the bodies that are kept beside the database."""
    home = Home(torpor_home(environment))
    home.prepare()
    database = await open_database(home.database_url, clock=clock)
    try:
        yield Reader(home=home, database=database, clock=clock)
    finally:
        await database.close()
