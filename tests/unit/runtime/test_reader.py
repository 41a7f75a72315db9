"""Who reads again and again notices that there will be nothing new: `torpor wait` and those that follow end by it."""

import shutil
from pathlib import Path

import pytest
from tests.unit.db.scene import new_scene

from torpor.core.errors import MachineUnfit, NotFound
from torpor.runtime.home import Home
from torpor.runtime.reader import Reader, open_reader
from torpor.testing.clock import FakeClock


async def code_of(reader: Reader, session: str) -> str:
    with pytest.raises((MachineUnfit, NotFound)) as refused:
        await reader.session(session)
    return refused.value.code


async def test_a_session_is_not_found_in_a_home_that_was_removed_or_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    async with open_reader({"TORPOR_HOME": str(home)}, FakeClock()) as reader:
        session = (await new_scene(reader.database)).session_id
        assert (await reader.session(session)).session_id == session
        shutil.rmtree(home)
        assert await code_of(reader, session) == "home_gone"
        async with open_reader({"TORPOR_HOME": str(home)}, FakeClock()) as another:
            assert Home(home).database_file.is_file()
            assert await code_of(another, session) == "session_not_found"
            assert await code_of(reader, session) == "home_gone"
