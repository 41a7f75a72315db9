"""A long session costs what is new in it, and gives back every byte of every request."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.unit.db.scene import Scene, new_scene

from torpor.core.ids import CallId
from torpor.db import requests, verify
from torpor.db.database import open_database
from torpor.testing.clock import FakeClock
from torpor.testing.coding_agent import CodingAgent

TURNS = 200
TURN_BYTES_MAX = 4096
REQUESTS = """SELECT (SELECT SUM(length(data) + 2 * length(digest) + 2 * length(session_id) + 20) FROM block)
    + (SELECT SUM(length(head) + 250) FROM request)"""
"""What requests take, with their rows' keys."""


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    database = await open_database(f"sqlite://{tmp_path}/torpor.db", clock=FakeClock())
    yield await new_scene(database)
    await database.close()


async def take_turns(scene: Scene, agent: CodingAgent, count: int) -> dict[CallId, bytes]:
    bodies: dict[CallId, bytes] = {}
    for _ in range(count):
        body = agent.body()
        pieces = agent.answer()
        bodies[await scene.write(lambda tx, body=body, pieces=pieces: scene.answer(tx, *pieces, body=body))] = body
    return bodies


async def test_storage_is_linear_and_every_request_comes_back(scene: Scene, tmp_path: Path) -> None:
    def stored() -> int:
        with closing(sqlite3.connect(tmp_path / "torpor.db")) as connection:
            return connection.execute(REQUESTS).fetchone()[0]

    agent = CodingAgent()
    bodies = await take_turns(scene, agent, 1)
    marks = [stored()]
    for _ in range(2):
        bodies |= await take_turns(scene, agent, TURNS // 2)
        marks.append(stored())
    first, second = marks[1] - marks[0], marks[2] - marks[1]
    assert second <= first * 1.1  # Were each request to repeat a list of all before it, this would be thrice as much.
    assert second / (TURNS / 2) <= TURN_BYTES_MAX
    for call_id, body in bodies.items():
        assert (await scene.read(lambda tx, call_id=call_id: requests.get_request(tx, call_id)))[1] == body
    assert await scene.read(lambda tx: verify.verify_chain(tx, scene.session_id)) == []


async def test_an_answer_takes_less_than_its_bytes_once_it_is_complete(scene: Scene, tmp_path: Path) -> None:
    agent = CodingAgent()
    pieces = agent.answer()
    await scene.write(lambda tx: scene.answer(tx, *pieces))
    with closing(sqlite3.connect(tmp_path / "torpor.db")) as connection:
        (rows,) = connection.execute("SELECT COUNT(*) FROM chunk").fetchone()
        (size,) = connection.execute("SELECT length(data) + length(layout) FROM answer").fetchone()
    assert rows == 0
    assert size < sum(map(len, pieces)) / 2
