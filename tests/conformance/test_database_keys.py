"""What the rows of keys promise, on every database: they come and go with their session, and change master together."""

import re
from dataclasses import replace

import pytest
from tests.unit.db.scene import Scene, new_scene, wrapped_key

from torpor.core.errors import Conflict
from torpor.core.ids import KeyId
from torpor.db import keys, sessions
from torpor.db.database import Database, Transaction
from torpor.db.keys import TENANT, WrappedKey

OLD, NEW = KeyId("key_m"), KeyId("key_n")


def again(row: WrappedKey) -> WrappedKey:
    return replace(row, master_id=NEW, wrapped=f"{row.whose} {NEW}".encode())


async def with_key(scene: Scene) -> Scene:
    def work(tx: Transaction) -> None:
        keys.add_tenant(tx, wrapped_key(TENANT))
        keys.add_session(tx, **scene.owner, key=wrapped_key(scene.session_id))

    await scene.write(work)
    return scene


async def test_of_two_tenant_secrets_the_first_is_kept(database: Database) -> None:
    assert await database.read(keys.tenant) is None
    first = await database.write(lambda tx: keys.add_tenant(tx, wrapped_key(TENANT)), durable=True)
    second = await database.write(lambda tx: keys.add_tenant(tx, wrapped_key(TENANT, NEW)), durable=True)
    assert first == second == wrapped_key(TENANT)


async def test_a_session_has_one_key_that_goes_with_it(scene: Scene) -> None:
    await with_key(scene)
    other = await with_key(await new_scene(scene.database))
    assert await scene.read(lambda tx: keys.of_session(tx, scene.session_id)) == wrapped_key(scene.session_id)
    with pytest.raises(Conflict):
        await scene.write(lambda tx: keys.add_session(tx, **scene.owner, key=wrapped_key(scene.session_id)))
    await scene.write(lambda tx: sessions.forget(tx, **scene.owner))
    assert await scene.read(lambda tx: keys.of_session(tx, scene.session_id)) is None
    assert await scene.read(keys.list_sessions) == [wrapped_key(other.session_id)]


async def test_session_that_is_not_made_leaves_no_key(scene: Scene) -> None:
    def work(tx: Transaction) -> None:
        keys.add_session(tx, **scene.owner, key=wrapped_key(scene.session_id))
        raise LookupError

    await scene.write(lambda tx: keys.add_tenant(tx, wrapped_key(TENANT)))
    with pytest.raises(LookupError):
        await scene.write(work)
    assert await scene.read(keys.list_sessions) == []


async def test_all_keys_change_their_master_together(scene: Scene) -> None:
    await with_key(scene)
    other = await with_key(await new_scene(scene.database))
    assert await scene.write(lambda tx: keys.rewrap_all(tx, OLD, again)) == 3
    assert await scene.read(keys.tenant) == again(wrapped_key(TENANT))
    assert await scene.read(keys.list_sessions) == [
        again(wrapped_key(made.session_id)) for made in sorted_by_id(scene, other)
    ]


def sorted_by_id(*scenes: Scene) -> list[Scene]:
    return sorted(scenes, key=lambda scene: scene.session_id)


async def test_master_that_was_changed_meanwhile_is_noticed_and_nothing_is_written(scene: Scene) -> None:
    await with_key(scene)
    with pytest.raises(Conflict) as refused:
        await scene.write(lambda tx: keys.rewrap_all(tx, NEW, again))
    assert refused.value.code == "master_key_changed"
    assert await scene.read(keys.tenant) == wrapped_key(TENANT)
    late = await new_scene(scene.database)
    with pytest.raises(Conflict) as refused:
        await scene.write(lambda tx: keys.add_session(tx, **late.owner, key=wrapped_key(late.session_id, NEW)))
    assert refused.value.code == "master_key_changed"


async def test_key_that_does_not_open_leaves_all_as_they_were(scene: Scene) -> None:
    await with_key(scene)

    def fail_at_the_session(row: WrappedKey) -> WrappedKey:
        if row.whose != TENANT:
            raise LookupError
        return again(row)

    with pytest.raises(LookupError):
        await scene.write(lambda tx: keys.rewrap_all(tx, OLD, fail_at_the_session))
    assert await scene.read(keys.tenant) == wrapped_key(TENANT)


async def test_nothing_to_change_is_no_error(database: Database) -> None:
    assert await database.write(lambda tx: keys.rewrap_all(tx, OLD, again), durable=True) == 0


async def test_deleted_key_is_in_no_file_of_the_database(scene: Scene, database_url: str) -> None:
    await with_key(scene)
    await scene.write(lambda tx: sessions.forget(tx, **scene.owner), durable=True)
    await scene.database.settle()
    path = re.sub("^sqlite://", "", database_url)
    for suffix in ("", "-wal"):
        with open(path + suffix, "rb") as file:
            assert f"{scene.session_id} {OLD}".encode() not in file.read()
