"""Where sessions come from, on every database: a fork's row, its first event, and all of a lineage."""

import pytest
from tests.unit.db.scene import NOW, Scene, new_scene

from torpor.core.errors import NotFound
from torpor.core.ids import SessionId, new_session_id
from torpor.db import log, sessions, verify
from torpor.db.database import Database, Transaction
from torpor.db.sessions import Parent


async def fork(database: Database, parent: SessionId, seq: int = 1, *, name: str | None = None) -> SessionId:
    session_id = new_session_id(NOW)

    def work(tx: Transaction) -> None:
        came_from = Parent(session_id=parent, seq=seq)
        sessions.create(tx, session_id=session_id, name=name, spec={}, wall_ns=NOW, parent=came_from)

    await database.write(work, durable=True)
    return session_id


async def lineage_of(database: Database, session_id: SessionId) -> set[SessionId]:
    found = await database.read(lambda tx: sessions.lineage(tx, session_id))
    assert len({session.session_id for session in found}) == len(found)
    return {session.session_id for session in found}


async def forget(scene: Scene) -> None:
    await scene.write(lambda tx: sessions.forget(tx, **scene.owner), durable=True)


async def test_a_fork_says_where_it_begins_in_its_row_and_in_its_chain(database: Database, scene: Scene) -> None:
    await scene.write(lambda tx: scene.intend(tx))
    child = await fork(database, scene.session_id, 2)
    session = await database.read(lambda tx: sessions.get(tx, child))
    assert session.parent == Parent(session_id=scene.session_id, seq=2)
    [created] = await database.read(lambda tx: log.events(tx, child))
    shared = (await scene.read(lambda tx: log.events(tx, scene.session_id)))[1]
    assert created.data["parent"] == {"session": scene.session_id, "seq": 2, "hash": shared.hash}
    assert await database.read(lambda tx: verify.verify_chain(tx, child)) == []


async def test_a_session_that_began_by_itself_has_no_parent(scene: Scene) -> None:
    session = await scene.read(lambda tx: sessions.get(tx, scene.session_id))
    assert session.parent is None
    assert "parent" not in (await scene.read(lambda tx: log.events(tx, scene.session_id)))[0].data


@pytest.mark.parametrize("seq", [-1, 0, 3, 2**40])
async def test_no_session_comes_from_an_event_that_is_not_there(database: Database, scene: Scene, seq: int) -> None:
    with pytest.raises(NotFound, match="it has none of that number") as refused:
        await fork(database, scene.session_id, seq)
    assert refused.value.code == "event_not_found"
    assert await lineage_of(database, scene.session_id) == {scene.session_id}


async def test_no_session_comes_from_one_that_is_not_there(database: Database, scene: Scene) -> None:
    with pytest.raises(NotFound, match="there is none"):
        await fork(database, new_session_id(NOW))


async def test_a_lineage_is_the_same_from_each_of_its_sessions(database: Database) -> None:
    root, stranger = await new_scene(database), await new_scene(database)
    left, right = await fork(database, root.session_id), await fork(database, root.session_id)
    leaf = await fork(database, left)
    await fork(database, stranger.session_id)
    for session_id in (root.session_id, left, right, leaf):
        assert await lineage_of(database, session_id) == {root.session_id, left, right, leaf}
    found = await database.read(lambda tx: sessions.lineage(tx, leaf))
    assert [session.session_id for session in found] == sorted(session.session_id for session in found)


async def test_a_lineage_goes_on_without_a_session_that_was_forgotten(database: Database) -> None:
    root = await new_scene(database)
    left, right = await fork(database, root.session_id), await fork(database, root.session_id)
    leaf = await fork(database, left)
    await forget(root)
    assert await lineage_of(database, leaf) == {left, leaf}
    assert await lineage_of(database, right) == {right}
    assert await lineage_of(database, root.session_id) == set()
