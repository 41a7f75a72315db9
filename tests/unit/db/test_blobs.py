"""Large bodies lie outside of the database, and nothing else about them is different."""

import random
import re
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.unit.db.blob_scene import MIB, BlobScene, flip_byte, new_blob_scene, noise, open_with_blobs, path_of, told
from tests.unit.db.scene import NOW, acquire, new_scene
from tests.unit.snapshots.making import tiny_disk_at

from torpor.core.call import CallState
from torpor.core.errors import Damaged, MachineUnfit, Superseded
from torpor.db import ahead, answers, blobs, blocks, calls, redaction, requests, sessions, verify
from torpor.db.blobs import BLOB_BYTES_MIN
from torpor.db.database import Transaction, open_database
from torpor.snapshots.backend import LocalDirectory
from torpor.testing.clock import FakeClock

SECRET = b"sk-planted-0123456789abcdef"
PATTERN = re.compile(SECRET)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[BlobScene]:
    made = await new_blob_scene(tmp_path)
    yield made
    await made.database.close()


def in_database(directory: Path, statement: str) -> int:
    with closing(sqlite3.connect(directory / "torpor.db")) as connection:
        return connection.execute(statement).fetchone()[0]


async def problems(scene: BlobScene) -> list[verify.Problem]:
    return await scene.read(lambda tx: verify.verify_chain(tx, scene.session_id))


async def redact(scene: BlobScene) -> redaction.Plan:
    plan = await scene.read(lambda tx: redaction.plan_pattern(tx, scene.session_id, PATTERN))
    await scene.ahead.masks(plan)
    await scene.write(lambda tx: redaction.apply(tx, **scene.owner, plan=plan, wall_ns=NOW), durable=True)
    await ahead.sweep(scene.database, scene.session_id)
    return plan


# --- where they lie -----------------------------------------------------------------------------------------------


async def test_large_bodies_come_back_and_leave_nothing_of_them_in_the_database(
    scene: BlobScene, tmp_path: Path
) -> None:
    body, pieces = told(noise(3 * MIB)), [noise(MIB, n) for n in range(20)]
    call_id = await scene.ask(body)
    answered = await scene.answered(*pieces)
    assert await scene.request_of(call_id) == body
    loaded = await scene.read(lambda tx: calls.load_chunks(tx, answered, 1))
    assert [chunk.data for chunk in loaded] == pieces
    assert await problems(scene) == []
    assert len(scene.objects) == 2
    assert all(key.startswith(f"blobs/{scene.session_id.removeprefix('ses_')}_") for key in scene.objects)
    assert in_database(tmp_path, "SELECT SUM(length(data)) FROM block") < 10_000
    assert in_database(tmp_path, "SELECT SUM(length(data)) FROM answer") == 0
    assert in_database(tmp_path, "SELECT COUNT(*) FROM chunk") == 0


@pytest.mark.parametrize(("size", "count"), [(BLOB_BYTES_MIN - 1, 0), (BLOB_BYTES_MIN, 1)])
async def test_what_counts_is_the_size_as_stored(scene: BlobScene, size: int, count: int) -> None:
    """Random bytes are stored as they are; a text of the same length is compressed, and stays in its row."""
    data = random.Random(7).randbytes(size)
    compressible = await scene.answered(b"words " * (2 * MIB))
    assert scene.objects == []
    answered = await scene.answered(data)
    assert len(scene.objects) == count
    assert await scene.answer_of(answered) == data
    assert await scene.answer_of(compressible) == b"words " * (2 * MIB)
    assert await problems(scene) == []


async def test_a_text_that_is_sent_again_is_put_once(scene: BlobScene) -> None:
    text = noise(2 * MIB)
    first = await scene.ask(told(text))
    [key] = scene.objects
    scene.store.delete(key)  # whoever puts it again is found out
    second = await scene.ask(told(text, "and then?"))
    assert scene.objects == []
    assert first != second


async def test_sessions_share_no_blob(scene: BlobScene) -> None:
    text = told(noise(2 * MIB))
    other = await new_scene(scene.database, "other")
    theirs = BlobScene(scene.database, other.session_id, other.owner_token)
    mine, its = await scene.ask(text), await theirs.ask(text)
    assert len(scene.objects) == 2
    await scene.write(lambda tx: sessions.forget(tx, **scene.owner), durable=True)
    await ahead.sweep(scene.database, scene.session_id)
    assert len(scene.objects) == 1
    assert await theirs.request_of(its) == text
    assert mine != its


async def test_what_rows_name_is_listed(scene: BlobScene) -> None:
    await scene.ask(told(noise(2 * MIB)))
    await scene.answered(noise(2 * MIB, 2))
    other = await new_scene(scene.database, "other")
    await BlobScene(scene.database, other.session_id, other.owner_token).ask(told(noise(2 * MIB, 3)))
    assert await scene.read(blobs.list_named) == set(scene.objects)
    mine = await scene.read(lambda tx: blobs.list_named_of(tx, scene.session_id))
    assert len(mine) == 2
    assert mine < set(scene.objects)


async def test_objects_that_no_row_names_are_swept_and_no_others(scene: BlobScene) -> None:
    call_id = await scene.ask(told(noise(2 * MIB)))
    [named] = scene.objects
    lost = blobs.store(scene.store, scene.session_id, noise(2 * MIB, 2))
    assert lost.blob is not None
    strange = blobs.store(scene.store, (await new_scene(scene.database, "other")).session_id, noise(2 * MIB, 2))
    assert len(scene.objects) == 3
    await ahead.sweep(scene.database, scene.session_id)
    assert strange.blob is not None
    assert set(scene.objects) == {named, *[key for key in scene.objects if key.endswith(strange.blob.hex())]}
    assert len(scene.objects) == 2
    assert await scene.request_of(call_id)


async def test_a_damaged_object_that_no_row_names_is_put_anew(scene: BlobScene, tmp_path: Path) -> None:
    """A kill left it, a bad disk changed it: whoever stores the same bytes must not name it unseen."""
    text = noise(2 * MIB)
    await scene.ask(told(text))
    await scene.write(lambda tx: sessions.forget(tx, **scene.owner), durable=True)
    [key] = scene.objects
    flip_byte(path_of(tmp_path, key))
    await scene.write(lambda tx: sessions.create(tx, session_id=scene.session_id, name=None, spec={}, wall_ns=NOW))
    scene.owner_token = await scene.write(lambda tx: acquire(tx, scene.session_id, seen_token=0))
    call_id = await scene.ask(told(text))
    assert await scene.request_of(call_id) == told(text)
    assert scene.objects == [key]


async def test_a_superseded_owner_names_no_blob(scene: BlobScene) -> None:
    call_id = await scene.arriving(noise(2 * MIB))
    packed = await scene.ahead.answer(call_id, 1)
    await scene.write(lambda tx: acquire(tx, scene.session_id, seen_token=scene.owner_token))
    with pytest.raises(Superseded):
        await scene.write(
            lambda tx: calls.complete(tx, **scene.owner, call_id=call_id, usage={}, packed=packed, wall_ns=NOW)
        )
    assert await scene.read(blobs.list_named) == set()
    assert await scene.answer_of(call_id) == noise(2 * MIB)


# --- answers that are packed ahead --------------------------------------------------------------------------------


async def test_chunks_of_a_long_answer_go_afterwards_and_nobody_sees_them(scene: BlobScene, tmp_path: Path) -> None:
    pieces = [noise(300_000, n) for n in range(10)]
    call_id = await scene.arriving(*pieces)
    await scene.end(call_id)
    assert in_database(tmp_path, "SELECT COUNT(*) FROM chunk") == 10
    assert await scene.answer_of(call_id) == b"".join(pieces)
    assert await problems(scene) == []
    batches = await scene.read(lambda tx: list(answers.batches(tx, call_id, 1)))
    assert batches == [3, 7, 9]
    await scene.write(
        lambda tx: answers.drop_chunks(tx, **scene.owner, call_id=call_id, attempt=1, last=batches[0])
    )  # and a kill
    assert in_database(tmp_path, "SELECT COUNT(*) FROM chunk") == 6
    assert await scene.answer_of(call_id) == b"".join(pieces)
    await scene.ahead.drop_rest()
    assert in_database(tmp_path, "SELECT COUNT(*) FROM chunk") == 0
    assert await scene.answer_of(call_id) == b"".join(pieces)
    assert await problems(scene) == []


async def test_chunks_that_no_answer_has_taken_up_are_never_dropped(scene: BlobScene, tmp_path: Path) -> None:
    call_id = await scene.arriving(noise(2 * MIB))
    await scene.ahead.drop_chunks(call_id, 1)
    await scene.ahead.drop_rest()
    with pytest.raises(Damaged):
        await scene.write(lambda tx: answers.drop_chunks(tx, **scene.owner, call_id=call_id, attempt=1, last=5))
    assert in_database(tmp_path, "SELECT COUNT(*) FROM chunk") == 1


async def test_an_answer_that_was_packed_too_early_is_packed_again(scene: BlobScene) -> None:
    call_id = await scene.arriving(noise(2 * MIB))
    packed = await scene.ahead.answer(call_id, 1)
    await scene.write(lambda tx: scene.add_chunks(tx, call_id, b"late", first=1))
    await scene.write(
        lambda tx: calls.complete(tx, **scene.owner, call_id=call_id, usage={}, packed=packed, wall_ns=NOW)
    )
    assert await scene.answer_of(call_id) == noise(2 * MIB) + b"late"
    assert await problems(scene) == []


async def test_long_answers_of_a_dead_node_are_torn_into_blobs(scene: BlobScene, tmp_path: Path) -> None:
    long, short = await scene.arriving(noise(2 * MIB)), await scene.arriving(b"short")
    assert set(await scene.ahead.tear_open(wall_ns=NOW)) == {long, short}
    assert len(scene.objects) == 1
    assert in_database(tmp_path, "SELECT COUNT(*) FROM chunk") == 0
    assert (await scene.answer_of(long), await scene.answer_of(short)) == (noise(2 * MIB), b"short")
    assert await problems(scene) == []


@pytest.fixture
async def cramped(tmp_path: Path) -> AsyncIterator[BlobScene]:
    """A scene whose store is on a disk of one megabyte."""
    with tiny_disk_at(tmp_path / "store"):
        made = await new_blob_scene(tmp_path)
        yield made
        await made.database.close()


async def test_an_answer_that_the_store_does_not_take_stays_in_its_rows(cramped: BlobScene) -> None:
    call_id = await cramped.answered(noise(3 * MIB))
    assert await cramped.answer_of(call_id) == noise(3 * MIB)
    assert (await cramped.read(lambda tx: calls.load_call(tx, call_id))).state is CallState.ANSWERED
    assert cramped.objects == []
    assert await problems(cramped) == []


async def test_a_request_that_the_store_does_not_take_leaves_nothing(cramped: BlobScene) -> None:
    before = await cramped.read(lambda tx: sessions.get(tx, cramped.session_id))
    with pytest.raises(MachineUnfit) as refused:
        await cramped.ask(told(noise(3 * MIB)))
    assert refused.value.code == "no_space"
    assert await cramped.read(lambda tx: sessions.get(tx, cramped.session_id)) == before
    assert cramped.objects == []


async def test_without_a_store_large_bodies_stay_in_rows_and_are_read_with_one(tmp_path: Path) -> None:
    """What an earlier version wrote is read as ever, and what is new beside it is a blob."""
    database = await open_database(f"sqlite://{tmp_path}/torpor.db", clock=FakeClock())
    made = await new_scene(database)
    before = BlobScene(database, made.session_id, made.owner_token)
    asked, answered = await before.ask(told(noise(3 * MIB))), await before.answered(noise(12 * MIB, 2))
    packed = await before.answered(noise(2 * MIB, 3))
    await database.close()
    after = BlobScene(await open_with_blobs(tmp_path), made.session_id, made.owner_token)
    after.store = LocalDirectory(tmp_path / "store")
    assert after.objects == []
    assert await after.request_of(asked) == told(noise(3 * MIB))
    assert await after.answer_of(answered) == noise(12 * MIB, 2)
    assert await after.answer_of(packed) == noise(2 * MIB, 3)
    await after.ask(told(noise(3 * MIB), "more"))
    assert after.objects == []  # the piece is there, in its row
    await after.answered(noise(2 * MIB, 4))
    assert len(after.objects) == 1
    assert await problems(after) == []
    await after.database.close()


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["flipped", "cut off", "vanished"])
async def test_a_damaged_blob_is_told_and_listed_and_spoils_nothing_else(
    scene: BlobScene, tmp_path: Path, what: str
) -> None:
    asked, whole_request = await scene.ask(told(noise(2 * MIB))), await scene.ask(told(noise(2 * MIB, 2)))
    answered, whole_answer = await scene.answered(noise(2 * MIB, 3)), await scene.answered(noise(2 * MIB, 4))
    digest = max(requests.prepare(told(noise(2 * MIB))).pieces, key=len)

    def find(tx: Transaction) -> list[bytes]:
        block = tx.one("block/find", session_id=scene.session_id, digest=blocks.digest_of(digest))
        answer = tx.one("call/find_answer", call_id=answered, attempt=1)
        assert block is not None
        assert answer is not None
        return [block["blob"], answer["blob"]]

    for digest in await scene.read(find):
        path = path_of(tmp_path, blobs.key_of(scene.session_id, digest))
        if what == "vanished":
            path.unlink()
        elif what == "flipped":
            flip_byte(path)
        else:
            path.chmod(0o600)
            path.write_bytes(path.read_bytes()[:-1])
    for reading, code in ((scene.request_of(asked), "block_damaged"), (scene.answer_of(answered), "answer_damaged")):
        with pytest.raises(Damaged) as damaged:
            await reading
        assert damaged.value.code == code
        assert ("missing" if what == "vanished" else "not what was written") in str(damaged.value)
    assert await scene.request_of(whole_request) == told(noise(2 * MIB, 2))
    assert await scene.answer_of(whole_answer) == noise(2 * MIB, 4)
    found = await problems(scene)
    assert [problem.code for problem in found] == ["request_damaged", "response_changed"]
    assert all("its blob" in problem.text for problem in found)


async def test_every_damaged_piece_of_one_request_is_listed(scene: BlobScene, tmp_path: Path) -> None:
    await scene.ask(told(noise(2 * MIB), noise(2 * MIB, 2).decode()))
    assert len(scene.objects) == 2
    for key in scene.objects:
        flip_byte(path_of(tmp_path, key))
    assert [problem.code for problem in await problems(scene)] == ["request_damaged"] * 2


async def test_damage_is_listed_of_what_came_of_an_answer_that_broke_off(scene: BlobScene, tmp_path: Path) -> None:
    call_id = await scene.arriving(noise(2 * MIB))
    packed = await scene.ahead.answer(call_id, 1)
    await scene.write(
        lambda tx: calls.fail(tx, **scene.owner, call_id=call_id, error="cut", packed=packed, wall_ns=NOW)
    )
    await scene.ahead.drop_chunks(call_id, 1)
    assert await scene.answer_of(call_id) == noise(2 * MIB)
    assert await problems(scene) == []
    path_of(tmp_path, scene.objects[0]).unlink()
    assert [problem.code for problem in await problems(scene)] == ["response_changed"]


async def test_a_database_that_is_opened_without_its_store_says_so(scene: BlobScene, tmp_path: Path) -> None:
    call_id = await scene.answered(noise(2 * MIB))
    database = await open_database(f"sqlite://{tmp_path}/torpor.db", clock=FakeClock())
    with pytest.raises(Damaged, match="missing from the store"):
        await database.read(lambda tx: calls.load_chunks(tx, call_id, 1))
    await database.close()


# --- redaction ----------------------------------------------------------------------------------------------------


async def test_redacted_blobs_are_masked_and_their_old_bytes_are_gone(scene: BlobScene, tmp_path: Path) -> None:
    text = noise(2 * MIB) + SECRET + noise(1000, 2)
    asked, answered = await scene.ask(told(text)), await scene.answered(text, b" and on")
    before = scene.objects
    plan = await redact(scene)
    assert len(plan.places) == 2
    assert len(scene.objects) == 2  # what is left is as large
    assert not set(scene.objects) & set(before)
    masked = text.replace(SECRET, b"*" * len(SECRET))
    assert await scene.answer_of(answered) == masked + b" and on"
    request = await scene.read(lambda tx: requests.read_request(tx, asked))
    assert (request.redacted, request.body) == (True, told(masked))
    assert await problems(scene) == []
    await scene.ask(told(text, "again"))  # stays masked
    assert not set(scene.objects) & set(before)
    assert not await scene.read(lambda tx: redaction.plan_pattern(tx, scene.session_id, PATTERN))


async def test_a_whole_blob_that_is_redacted_leaves_a_short_row(scene: BlobScene, tmp_path: Path) -> None:
    text = noise(2 * MIB)
    answered = await scene.answered(text)
    plan = await scene.read(lambda tx: redaction.plan_block(tx, scene.session_id, blocks.digest_of(text)))
    await scene.ahead.masks(plan)
    await scene.write(lambda tx: redaction.apply(tx, **scene.owner, plan=plan, wall_ns=NOW), durable=True)
    await ahead.sweep(scene.database, scene.session_id)
    assert scene.objects == []
    assert await scene.answer_of(answered) == b"*" * len(text)
    assert await problems(scene) == []


async def test_redaction_of_an_answer_takes_the_chunks_that_a_kill_left(scene: BlobScene, tmp_path: Path) -> None:
    text = noise(2 * MIB) + SECRET
    call_id = await scene.arriving(text)
    await scene.end(call_id)  # and a kill: its chunk is still there
    await redact(scene)
    assert in_database(tmp_path, "SELECT COUNT(*) FROM chunk") == 0
    await scene.database.settle()
    await scene.database.close()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET not in path.read_bytes(), path


async def test_equal_answers_share_a_blob_which_goes_with_the_last(scene: BlobScene) -> None:
    first, second = await scene.answered(noise(2 * MIB)), await scene.answered(noise(2 * MIB))
    assert len(scene.objects) == 1
    masked = b"*" * 2 * MIB
    for call_id, left in ((first, 1), (second, 0)):
        plan = redaction.Plan(answers={(call_id, 1): masked})
        await scene.ahead.masks(plan)
        await scene.write(
            lambda tx, plan=plan: redaction.apply(tx, **scene.owner, plan=plan, wall_ns=NOW), durable=True
        )
        await ahead.sweep(scene.database, scene.session_id)
        assert len(scene.objects) == left
    assert await problems(scene) == []


async def test_what_is_damaged_keeps_nobody_from_erasing_the_rest(scene: BlobScene, tmp_path: Path) -> None:
    await scene.ask(told(noise(2 * MIB), SECRET.decode() + noise(2 * MIB, 2).decode()))
    await scene.answered(noise(2 * MIB, 3))
    intact = await scene.answered(noise(2 * MIB, 4) + SECRET)
    digest = blocks.digest_of(max(requests.prepare(told(noise(2 * MIB))).pieces, key=len))

    def find(tx: Transaction) -> bytes:
        row = tx.one("block/find", session_id=scene.session_id, digest=digest)
        assert row is not None
        return row["blob"]

    path_of(tmp_path, blobs.key_of(scene.session_id, await scene.read(find))).unlink()
    plan = await redact(scene)
    assert len(plan.places) == 2
    assert len(plan.unread) == 1
    assert "missing from the store" in plan.unread[0]
    assert SECRET not in await scene.answer_of(intact)
