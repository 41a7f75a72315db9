"""Reads the rows of sessions: nothing that runs one, keeps its snapshots or talks to a provider is imported for it.

`Runtime` is a reader that can do all the rest; importing that takes longer than most commands that only read.
"""

import contextlib
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

from torpor.config import torpor_home
from torpor.core.clock import Clock
from torpor.core.errors import MachineUnfit
from torpor.db import sessions
from torpor.db.database import Database, open_database
from torpor.runtime.home import Home


class Reader:
    """One process's view of TORPOR_HOME. Build it with `open_reader`."""

    def __init__(self, *, home: Home, database: Database, clock: Clock) -> None:
        self.home = home
        self.database = database
        self.clock = clock
        self._opened = _identity(home.database_file)

    async def session(self, text: str) -> sessions.Session:
        """Find a session by id, unique beginning of an id, or name.

        Raises:
            NotFound: `session_not_found`.
            InvalidInput: `session_ambiguous`.
            MachineUnfit: `home_gone`: what would be read is a file that was deleted, and that nobody will write again.
        """
        if _identity(self.home.database_file) != self._opened:
            raise MachineUnfit(
                "home_gone",
                f"cannot find session {text!r}: {self.home.root} was removed or replaced meanwhile",
                hint="The same command again looks into the one that is there now.",
            )
        return await self.database.read(lambda tx: sessions.find(tx, text))


def _identity(file: Path) -> tuple[int, int] | None:
    """Which file has the name; None: there is none."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


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
