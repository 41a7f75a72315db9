"""Nothing that is written can be changed behind Torpor's back without `verify_chain` saying so."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.db.scene import HEAD, NOW, Scene, conversation, new_scene

from torpor.db import checkpoints, sessions, verify
from torpor.db.call_rows import head_digest
from torpor.db.database import Transaction, open_database
from torpor.testing.clock import FakeClock

EVENT_COLUMNS = {
    "seq": "seq + 100",
    "parent_seq": "COALESCE(parent_seq, 0) + 1",
    "incarnation": "incarnation + 1",
    "wall_ns": "wall_ns + 1",
    "kind": "CASE kind WHEN 'call.sent' THEN 'call.torn' ELSE 'call.sent' END",
    "kind ": "'call.invented'",
    "call_id": "COALESCE(call_id, '') || 'x'",
    "data": "'{}'",
    "data ": "'{'",
    "refs": """'["00"]'""",
    "prev_hash": "hash",
    "hash": "prev_hash",
}
OTHER_ROWS = {
    "an event inserted": "INSERT INTO event SELECT session_id, seq + 1, parent_seq, incarnation, wall_ns, kind,"
    " call_id, data, refs, prev_hash, hash FROM event ORDER BY seq DESC LIMIT 1",
    "the last event gone": "DELETE FROM event WHERE seq = (SELECT MAX(seq) FROM event)",
    "an event gone": "DELETE FROM event WHERE seq = 4",
    "the head's seq": "UPDATE session SET head_seq = head_seq - 1",
    "the head's hash": "UPDATE session SET head_hash = ''",
    "the cursor": "UPDATE session SET cursor_seq = 2",
    "a parent": "UPDATE session SET parent_id = session_id, forked_at_seq = 1",
    "an answer changed": "UPDATE answer SET data = CAST('zeroonetwo' AS BLOB) WHERE data = CAST('012' AS BLOB)",
    "an answer's byte changed": "UPDATE answer SET data = CAST('zeroonetwa' AS BLOB) WHERE length(data) = 10",
    "a byte moved between chunks": "UPDATE answer SET layout = x'000402020204' WHERE length(data) = 10",
    "a chunk's time": "UPDATE answer SET layout = x'000404030203' WHERE length(data) = 10",
    "an answer's layout cut off": "UPDATE answer SET layout = substr(layout, 1, 3)",
    "an answer gone": "DELETE FROM answer WHERE length(data) = 10",
    "an answer said to be redacted": "UPDATE answer SET codec = 'redacted-' || codec",
    "a block said to be redacted": "UPDATE block SET codec = 'redacted-' || codec WHERE size_bytes > 1000",
    "a call gone": "DELETE FROM call WHERE state = 'answered'",
    "a call's state": "UPDATE call SET state = 'sent'",
    "an open call's state": "UPDATE call SET state = 'answered'",
    "a call's method": "UPDATE call SET about = replace(about, 'POST', 'GET')",
    "a call's key": "UPDATE call SET key_logical = 'other'",
    "a call's stream": "UPDATE call SET stream = stream + 1",
    "a response head": "UPDATE attempt SET head = replace(head, '200', '201')",
    "a request gone": "DELETE FROM request",
    "a request's head": "UPDATE request SET head_digest = x'00'",
    "a request's manifest": "UPDATE request SET manifest = (SELECT digest FROM block LIMIT 1)",
    "a request's digest": "UPDATE request SET body_digest = ''",
    "a block changed": "UPDATE block SET codec = 'raw', data = x'00' WHERE size_bytes > 1000",
    "a block cut off": "UPDATE block SET data = substr(data, 1, length(data) - 5) WHERE codec = 'zstd'",
    "a block gone": "DELETE FROM block WHERE size_bytes = (SELECT MAX(size_bytes) FROM block)",
    "a note changed": "UPDATE block SET data = CAST('it is dono' AS BLOB) WHERE data = CAST('it is done' AS BLOB)",
    "a note gone": "DELETE FROM block WHERE data = CAST('it is done' AS BLOB)",
    "a note said to be redacted": "UPDATE block SET codec = 'redacted-raw' WHERE data = CAST('it is done' AS BLOB)",
    "a manifest gone": "DELETE FROM block WHERE digest = (SELECT manifest FROM request ORDER BY number LIMIT 1)",
    "a checkpoint's seq": "UPDATE checkpoint SET seq = seq - 1",
    "a checkpoint's streams": "UPDATE checkpoint SET open_streams = '[]'",
    "a checkpoint's commit": "UPDATE checkpoint SET committed_seq = committed_seq - 1",
}


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    database = await open_database(f"sqlite://{tmp_path}/torpor.db", clock=FakeClock())
    scene = await new_scene(database)

    def fill(tx: Transaction) -> None:
        scene.answer(tx, b"zero", b"one", b"two", body=conversation(3))
        scene.answer(tx, b"0", b"1", b"2", body=conversation(4))
        scene.note(tx, "it is done")
        open_call = scene.send(tx, conversation(5))
        scene.add_chunks(tx, open_call, b"some")
        head = sessions.get(tx, scene.session_id).head_seq
        checkpoints.commit(tx, **scene.owner, checkpoint=scene.checkpoint(0, head, open_call), wall_ns=NOW)

    await scene.write(fill, durable=True)
    yield scene
    await database.close()


def tamper(directory: Path, statement: str) -> None:
    with closing(sqlite3.connect(directory / "torpor.db", isolation_level=None)) as connection:
        assert connection.execute(statement).rowcount > 0


async def problems(scene: Scene) -> set[str]:
    return {problem.code for problem in await scene.read(lambda tx: verify.verify_chain(tx, scene.session_id))}


def test_a_head_from_before_a_field_was_added_has_the_digest_that_the_log_has_of_it() -> None:
    assert head_digest(HEAD) == "3cb7f85c944df13f7a2ab47ce343125fc3ebc7eabf3970d54cd1d5c0edc26167"
    assert head_digest(replace(HEAD, usage_asked=True)) != head_digest(HEAD)


async def test_untouched_log_has_no_problem(scene: Scene) -> None:
    assert await problems(scene) == set()


@pytest.mark.parametrize("seq", [1, 4, 9])
@pytest.mark.parametrize("column", sorted(EVENT_COLUMNS))
async def test_each_changed_field_of_an_event_is_found(scene: Scene, tmp_path: Path, column: str, seq: int) -> None:
    tamper(tmp_path, f"UPDATE event SET {column.strip()} = {EVENT_COLUMNS[column]} WHERE seq = {seq}")
    assert await problems(scene) & {"event_missing", "chain_broken", "event_changed"}


@pytest.mark.parametrize("what", sorted(OTHER_ROWS))
async def test_each_other_change_is_found(scene: Scene, tmp_path: Path, what: str) -> None:
    tamper(tmp_path, OTHER_ROWS[what])
    assert await problems(scene)


async def test_event_resealed_in_the_middle_breaks_the_chain(scene: Scene, tmp_path: Path) -> None:
    tamper(tmp_path, "UPDATE event SET hash = IIF(hash LIKE 'f%', 'e', 'f') || substr(hash, 2) WHERE seq = 5")
    found = await scene.read(lambda tx: verify.verify_chain(tx, scene.session_id))
    assert [(problem.code, problem.seq) for problem in found] == [("event_changed", 5), ("chain_broken", 6)]
