"""Sessions with large bodies as people read, search, export and import them; and with damage in one turn."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.unit.db.blob_scene import MIB, BlobScene, flip_byte, new_blob_scene, noise, open_with_blobs, path_of, told
from tests.unit.db.scene import new_scene

from torpor.core.errors import Conflict, Damaged, InvalidInput
from torpor.core.ids import CallId
from torpor.db import blobs, calls, log, requests, verify
from torpor.db.database import Database, Transaction
from torpor.runtime import spans, transfer, turns
from torpor.runtime.home import Home
from torpor.runtime.search import open_index
from torpor.runtime.transfer import Incoming
from torpor.testing.clock import FakeClock


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[BlobScene]:
    made = await new_blob_scene(tmp_path)
    yield made
    await made.database.close()


def said(text: bytes) -> bytes:
    return json.dumps({"role": "assistant", "content": [{"type": "text", "text": text.decode()}]}).encode()


async def turn(scene: BlobScene, word: str, *, large: bool = True) -> tuple[CallId, bytes, bytes]:
    """A turn whose request and answer hold a word of its own in megabytes of others."""
    bulk = noise(2 * MIB if large else 100, hash(word))
    body = told(b"asked " + word.encode() + b" " + bulk)
    answer = said(b"answered " + word.encode() + b" " + bulk)
    prepared = await scene.ahead.request(requests.prepare(body))
    call_id = await scene.write(lambda tx: scene.send_prepared(tx, prepared))
    await scene.write(lambda tx: scene.add_chunks(tx, call_id, answer[:1000], answer[1000:]))
    await scene.end(call_id)
    await scene.ahead.drop_chunks(call_id, 1)
    return call_id, body, answer


async def three_turns(scene: BlobScene) -> list[tuple[CallId, bytes, bytes]]:
    return [
        await turn(scene, "apricot"),
        await turn(scene, "blackberry"),
        await turn(scene, "cherry", large=False),
    ]


async def found(scene: BlobScene, home: Home, word: str) -> list[tuple[int | None, str]]:
    async with open_index(home, scene.database, FakeClock()) as index:
        return sorted((match.turn, match.source) for match in await index.find([word], session_id=None, limit=50))


async def damage(scene: BlobScene, directory: Path, call_id: CallId, *, request: bool) -> None:
    """Change a byte of the blob of a request, or of an answer."""

    def find(tx: Transaction) -> bytes:
        if not request:
            row = tx.one("call/find_answer", call_id=call_id, attempt=1)
        else:
            stored = requests.find(tx, call_id)
            assert stored is not None
            pieces = requests.pieces_of(requests.read_list(tx, scene.session_id, stored.manifest))
            rows = [tx.one("block/find", session_id=scene.session_id, digest=piece) for piece in pieces]
            [row] = [row for row in rows if row is not None and row["blob"] is not None]
        assert row is not None
        return row["blob"]

    flip_byte(path_of(directory, blobs.key_of(scene.session_id, await scene.read(find))))


# --- whole --------------------------------------------------------------------------------------------------------


async def test_turns_search_and_spans_read_large_bodies(scene: BlobScene, tmp_path: Path) -> None:
    made = await three_turns(scene)
    assert len(scene.objects) == 4
    for number, (_, body, answer) in enumerate(made, 1):
        content = await scene.read(lambda tx, number=number: turns.read_turn(tx, scene.session_id, number))
        assert (content.request, content.answer) == (body, answer)
    assert [each.damage for each in await scene.read(lambda tx: turns.list_turns(tx, scene.session_id))] == [None] * 3
    assert await found(scene, Home(tmp_path), "blackberry") == [(2, "answer"), (2, "request")]
    root = await scene.read(lambda tx: spans.session_spans(tx, scene.session_id, contents=True))
    assert "apricot" in str(root.below[0].attributes["gen_ai.output.messages"])


async def imported(directory: Path, lines: list[str]) -> Database:
    """Import into a home of its own, as `torpor import` does."""
    database = await open_with_blobs(directory)
    try:
        await transfer.bring_in(Incoming(lines), database, Home(directory))
    except BaseException:
        await database.close()
        raise
    return database


async def exported(scene: BlobScene) -> list[str]:
    lines = await scene.read(lambda tx: list(transfer.export_lines(tx, scene.session_id)))
    return [json.dumps(line) for line in lines]


def objects_of(database: Database) -> list[str]:
    assert database.blobs is not None
    return database.blobs.list("blobs/")


async def test_an_export_holds_the_blobs_and_comes_back_with_them(scene: BlobScene, tmp_path: Path) -> None:
    made = await three_turns(scene)
    lines = await exported(scene)
    assert max(map(len, lines)) < 2 * MIB, "no line is as long as a body may be"
    other = await imported(tmp_path / "other", lines)
    assert objects_of(other) == scene.objects
    assert await other.read(lambda tx: verify.verify_chain(tx, scene.session_id)) == []
    events = await scene.read(lambda tx: log.events(tx, scene.session_id))
    assert await other.read(lambda tx: log.events(tx, scene.session_id)) == events
    for call_id, body, answer in made:
        assert (await other.read(lambda tx, call_id=call_id: requests.get_request(tx, call_id)))[1] == body
        chunks = await other.read(lambda tx, call_id=call_id: calls.load_chunks(tx, call_id, 1))
        assert [chunk.data for chunk in chunks] == [answer[:1000], answer[1000:]]
    with pytest.raises(Conflict):
        await transfer.bring_in(Incoming(lines), other, Home(tmp_path / "other"))
    assert objects_of(other) == scene.objects, "a second import takes nothing from the first"
    await other.close()


async def test_an_export_of_a_session_whose_chunks_are_not_all_dropped_holds_them_once(
    scene: BlobScene, tmp_path: Path
) -> None:
    call_id = await scene.arriving(noise(2 * MIB))
    await scene.end(call_id)
    lines = await exported(scene)
    assert not [line for line in lines if '"row": "chunk"' in line]
    other = await imported(tmp_path / "other", lines)
    assert await other.read(lambda tx: verify.verify_chain(tx, scene.session_id)) == []
    await other.close()


async def test_an_import_that_fails_leaves_no_blob(scene: BlobScene, tmp_path: Path) -> None:
    await three_turns(scene)
    lines = await exported(scene)
    parts = [at for at, line in enumerate(lines) if '"row": "blob"' in line]
    first = json.loads(lines[parts[0]])
    event = next(at for at, line in enumerate(lines) if '"row": "event"' in line)
    wrong = {
        "cut off": lines[:-1],
        "cut off in a blob": lines[: parts[1]],
        "a part gone": [*lines[: parts[0]], *lines[parts[1] :]],
        "another byte": [lines[0], lines[1].replace("QUFB", "QUFC", 1).replace('": "', '": "A', 1), *lines[2:]],
        "another name": [lines[0], json.dumps({**first, "blob": "00" * 32}), *lines[2:]],
        "no bytes": [lines[0], json.dumps({**first, "bytes": 0, "data": {"base64": ""}}), *lines[2:]],
        "a key of somebody else": [lines[0], json.dumps({**first, "blob": "../../x"}), *lines[2:]],
        "another event": [
            *lines[:event],
            lines[event].replace('"incarnation": 0', '"incarnation": 7'),
            *lines[event + 1 :],
        ],
        "a blob among the rows": [*lines[:-1], lines[1], lines[-1]],
        "a session of no shape": [lines[0].replace(scene.session_id, "../../x"), *lines[1:]],
    }
    for name, candidate in wrong.items():
        home = tmp_path / name
        with pytest.raises(InvalidInput):
            await imported(home, candidate)
        database = await open_with_blobs(home)
        assert objects_of(database) == [], name
        assert await database.read(lambda tx: tx.one("session/find_by_id", session_id=scene.session_id)) is None
        await database.close()


async def test_an_import_without_one_of_its_blobs_is_refused(scene: BlobScene, tmp_path: Path) -> None:
    await turn(scene, "apricot")
    lines = [line for line in await exported(scene) if '"row": "blob"' not in line]
    count = json.loads(lines[-1])["end"]
    lines[-1] = json.dumps({"end": len(lines) - 2})
    assert count > len(lines) - 2
    with pytest.raises(InvalidInput, match="missing from the store"):
        await imported(tmp_path / "other", lines)


# --- damaged ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [True, False], ids=["request", "answer"])
async def test_damage_in_one_turn_is_told_there_and_the_others_are_read(
    scene: BlobScene, tmp_path: Path, request_: bool
) -> None:
    made = await three_turns(scene)
    await damage(scene, tmp_path, made[0][0], request=request_)
    with pytest.raises(Damaged) as damaged:
        await scene.read(lambda tx: turns.read_turn(tx, scene.session_id, 1))
    assert damaged.value.code == ("block_damaged" if request_ else "answer_damaged")
    for number in (2, 3):
        content = await scene.read(lambda tx, number=number: turns.read_turn(tx, scene.session_id, number))
        assert content.answer == made[number - 1][2]
    listed = await scene.read(lambda tx: turns.list_turns(tx, scene.session_id))
    assert [each.damage is not None for each in listed] == [True, False, False]
    home = Home(tmp_path)
    assert await found(scene, home, "apricot") == [(1, "answer" if request_ else "request")]
    assert await found(scene, home, "cherry") == [(3, "answer"), (3, "request")]
    root = await scene.read(lambda tx: spans.session_spans(tx, scene.session_id, contents=True))
    assert "torpor.damage" in root.below[0].attributes
    assert "cherry" in str(root.below[2].attributes["gen_ai.output.messages"])
    with pytest.raises(Damaged) as refused:
        await exported(scene)
    assert refused.value.code == "blob_damaged"
    other = await new_scene(scene.database, "other")
    assert await scene.read(lambda tx: verify.verify_chain(tx, other.session_id)) == []
