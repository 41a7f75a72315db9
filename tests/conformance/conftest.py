"""Every implementation of a seam, for the suite that all of them pass."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from tests.unit.db.scene import Scene, new_scene

from torpor.db.database import Database, open_database
from torpor.testing.clock import FakeClock

DATABASE_URLS: dict[str, Callable[[Path], str]] = {"sqlite": lambda directory: f"sqlite://{directory}/torpor.db"}


@pytest.fixture(params=sorted(DATABASE_URLS))
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return DATABASE_URLS[request.param](tmp_path)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = await open_database(database_url, clock=FakeClock())
    yield opened
    await opened.close()


@pytest.fixture
async def scene(database: Database) -> Scene:
    return await new_scene(database)
