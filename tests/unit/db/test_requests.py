"""Request bodies come back byte for byte, whatever they are, and a conversation costs what is new in it."""

import json
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.db.scene import NOW, REQUEST_HEAD, Scene, conversation, new_scene

from torpor.core.errors import Damaged, NotFound
from torpor.core.ids import CallId
from torpor.db import bodies, calls, manifests, requests
from torpor.db.bodies import PIECE_BYTES, PIECES_MAX
from torpor.db.database import Transaction, open_database
from torpor.db.manifests import CHAIN_LENGTH_MIN, DIGEST_BYTES
from torpor.db.requests import PreparedBody
from torpor.testing.clock import FakeClock

LONG = "x" * 2000
JSON = st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda value: json.dumps(value).encode())
MANIFEST_BYTES = "SELECT SUM(length(data)) FROM block WHERE digest IN (SELECT manifest FROM request)"
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "not json": b"POST / HTTP/1.1\r\n\r\n\x00\xff",
    "array": b"[1,2,3]",
    "empty object": b"{}",
    "empty arrays": b'{"a":[],"b":[ ],"c":[\n]}',
    "cut off": conversation(3)[:-700],
    "doubled": conversation(2) * 2,
    "duplicate keys": b'{"messages":[1],"messages":[2],"messages":["%s"]}' % LONG.encode(),
    "trailing comma": b'{"messages":[1,2,],"a":1,}',
    "no commas": b'{"messages":[1 2 "%s" 3]}' % LONG.encode(),
    "colon missing": b'{"messages"[1]}',
    "deep": b'{"messages":[' + b"[" * 100_000 + b"]" * 100_000 + b"]}",
    "deep and open": b'{"messages":' + b"[{" * 50_000,
    "invalid UTF-8": b'{"messages":["\xff\xfe\x80%s"]}' % LONG.encode(),
    "UTF-16": conversation(2).decode().encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + conversation(2),
    "NUL": b'{"messages":["\x00%s"]}' % LONG.encode(),
    "raw newlines": b'{"messages":["a\nb%s"]}' % LONG.encode(),
    "escapes": json.dumps({"messages": ['\\"' * 1000, '"' * 999, "\\" * 1001, "\ud800" * 500]}).encode(),
    "huge number": b'{"messages":[' + b"9" * 100_000 + b"]}",
    "NaN": b'{"messages":[NaN,Infinity,-Infinity]}',
    "many elements": b'{"input":[' + b",".join(b"%d" % n for n in range(200_000)) + b"]}",
    "never ended string": b'{"messages":["' + b'\\"' * 500_000,
    "unbalanced": b"]}" * 300_000 + b"[{" * 300_000,
    "many keys": b"{" + b",".join(b'"%d":[]' % n for n in range(50_000)) + b"}",
    "many long strings": json.dumps({"input": [LONG[:600]] * (PIECES_MAX + 1)}).encode(),
    "random": os.urandom(300_000),
    "white space": b' \n{ "messages" : [ {"a" : "%s" } , 2 ] , "b" : 1 } \r\n ' % LONG.encode(),
    "huge string": json.dumps({"messages": [{"content": "data:image/png;base64," + "A" * 8_000_000}]}).encode(),
}


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    database = await open_database(f"sqlite://{tmp_path}/torpor.db", clock=FakeClock())
    yield await new_scene(database)
    await database.close()


async def intend(scene: Scene, body: bytes | PreparedBody) -> CallId:
    prepared = requests.prepare(body) if isinstance(body, bytes) else body
    call = scene.new_call()
    await scene.write(
        lambda tx: calls.intend(tx, **scene.owner, call=call, head=REQUEST_HEAD, body=prepared, wall_ns=NOW)
    )
    return call.call_id


async def body_of(scene: Scene, call_id: CallId) -> bytes:
    return (await scene.read(lambda tx: requests.get_request(tx, call_id)))[1]


# --- cutting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_pieces_join_to_the_body(name: str) -> None:
    pieces = bodies.split(HOSTILE[name])
    assert b"".join(pieces) == HOSTILE[name]
    assert len(pieces) <= PIECES_MAX
    assert len(pieces) <= 3 * (len(HOSTILE[name]) // PIECE_BYTES + 1)


@given(
    st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_pieces_join_to_any_body(body: bytes) -> None:
    assert b"".join(bodies.split(body)) == body


def test_next_turn_repeats_almost_every_piece() -> None:
    before, after = set(bodies.split(conversation(50))), bodies.split(conversation(51))
    fresh = [piece for piece in after if piece not in before]
    assert sum(map(len, fresh)) < len(conversation(51)) - len(conversation(50)) + 2 * PIECE_BYTES


def test_moved_cache_marker_does_not_store_the_message_again() -> None:
    marked, plain = conversation(5), conversation(5, marker=False)
    fresh = set(bodies.split(plain)) - set(bodies.split(marked))
    assert sum(map(len, fresh)) < PIECE_BYTES


def test_keys_in_another_order_store_little_again() -> None:
    body = json.loads(conversation(5))
    other = json.dumps(dict(reversed(body.items())), separators=(",", ":")).encode()
    fresh = set(bodies.split(other)) - set(bodies.split(conversation(5)))
    assert sum(map(len, fresh)) < 2 * PIECE_BYTES


# --- manifests ----------------------------------------------------------------------------------------------------


def digests(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(DIGEST_BYTES) for number in numbers)


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_manifest_against_any_base_gives_the_list(one: list[int], other: list[int]) -> None:
    base_list, wanted = digests(*one), digests(*other)
    base = manifests.full(base_list)
    manifest = manifests.delta(wanted, base_digest=b"b" * 32, base=base, base_list=base_list)
    packed = manifests.unpack(manifest.pack())
    assert packed == manifest
    assert manifests.resolve([packed, base] if packed.base else [packed]) == wanted


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=2, max_size=8))
def test_chain_of_manifests_gives_the_newest_list(lists: list[list[int]]) -> None:
    chain = [manifests.full(digests(*lists[0]))]
    for before, after in pairwise(lists):
        newer = manifests.delta(digests(*after), base_digest=b"b" * 32, base=chain[0], base_list=digests(*before))
        chain = [newer, *chain] if newer.base else [newer]
        assert manifests.resolve(chain) == digests(*after)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_manifest_of_any_bytes_is_refused_or_read(data: bytes) -> None:
    for candidate in (data, b"TM1\0" + data):
        try:
            manifests.resolve([manifests.unpack(candidate), manifests.full(digests(1, 2, 3))])
        except ValueError:
            continue


# --- storing ------------------------------------------------------------------------------------------------------


async def test_hostile_bodies_come_back_as_they_were(scene: Scene) -> None:
    stored = {name: await intend(scene, body) for name, body in HOSTILE.items()}
    for name, call_id in stored.items():
        assert await body_of(scene, call_id) == HOSTILE[name], name


async def test_equal_requests_share_everything(scene: Scene, tmp_path: Path) -> None:
    first = await intend(scene, conversation(20))
    blocks = count(tmp_path, "SELECT COUNT(*) FROM block")
    second = await intend(scene, conversation(20))
    assert count(tmp_path, "SELECT COUNT(*) FROM block") == blocks
    assert await body_of(scene, first) == await body_of(scene, second) == conversation(20)


async def test_agents_that_take_turns_find_their_own_last_request(scene: Scene, tmp_path: Path) -> None:
    def helper(turn: int) -> bytes:
        messages = [{"role": "user", "content": f"{n}{LONG}"} for n in range(turn)]
        return json.dumps({"model": "small", "messages": messages}).encode()

    ids = [
        (await intend(scene, body), body)
        for turn in range(1, 80)
        for body in (conversation(turn), helper(turn), helper(300 + turn))
    ]
    for call_id, body in ids:
        assert await body_of(scene, call_id) == body
    assert count(tmp_path, MANIFEST_BYTES) < 60_000


async def test_rewound_conversation_comes_back(scene: Scene) -> None:
    turns = [1, 5, 9, 3, 4, 3, 9, 9, 1, 2]
    ids = [await intend(scene, conversation(turn)) for turn in turns]
    for call_id, turn in zip(ids, turns, strict=True):
        assert await body_of(scene, call_id) == conversation(turn)


async def test_short_list_is_written_anew_before_its_chain_is_long(scene: Scene) -> None:
    lengths: set[int] = set()
    for turn in range(3 * CHAIN_LENGTH_MIN):
        call_id = await intend(scene, json.dumps({"messages": [LONG, turn]}).encode())
        request = await scene.read(lambda tx, call_id=call_id: requests.find(tx, call_id))
        assert request is not None
        digest = request.manifest
        manifest = await scene.read(lambda tx, at=digest: requests.read_manifest(tx, scene.session_id, at))
        lengths.add(manifest.chain_length)
    assert lengths == set(range(CHAIN_LENGTH_MIN + 1))


async def test_missing_request_is_not_found_and_damaged_block_is_named(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await body_of(scene, CallId("call_none"))
    call_id = await intend(scene, conversation(3))
    with closing(sqlite3.connect(tmp_path / "torpor.db", isolation_level=None)) as connection:
        connection.execute("UPDATE block SET data = x'00' WHERE size_bytes > 5000")
    with pytest.raises(Damaged) as damaged:
        await body_of(scene, call_id)
    assert damaged.value.code == "block_damaged"


@pytest.mark.timeout(600)
async def test_thousand_turns_are_stored_linearly_and_come_back(scene: Scene, tmp_path: Path) -> None:
    sizes: dict[int, int] = {}
    raw, ids = 0, {}
    for turn in range(1, 1001):
        body = conversation(turn)
        raw += len(body)
        prepared = requests.prepare(body)
        ids[turn] = (await intend(scene, prepared), prepared.digests)
        if turn % 250 == 0:
            sizes[turn] = count(tmp_path, "SELECT SUM(length(data)) FROM block")
            lists = count(tmp_path, MANIFEST_BYTES)
            print(
                f"{turn} turns, {raw / 1e6:.1f} MB: {sizes[turn] / 1e6:.2f} MB in blocks, {lists / 1e6:.2f} of it lists"
            )
    pages = count(tmp_path, "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")
    print(f"database {pages / 1e6:.2f} MB; the longest body has {len(body) / 1e6:.2f} MB")
    assert sizes[1000] < 4 * sizes[250]
    for turn, (call_id, digests_then) in ids.items():
        if turn % 20 == 0 or turn > 990:
            assert await body_of(scene, call_id) == conversation(turn)
        else:  # equal digests of pieces that are checked by their digests
            assert await list_of(scene, call_id) == digests_then


async def list_of(scene: Scene, call_id: CallId) -> bytes:
    def read(tx: Transaction) -> bytes:
        request = requests.find(tx, call_id)
        assert request is not None
        return requests.read_list(tx, scene.session_id, request.manifest)

    return await scene.read(read)


def count(directory: Path, statement: str) -> int:
    with closing(sqlite3.connect(directory / "torpor.db")) as connection:
        return connection.execute(statement).fetchone()[0]
