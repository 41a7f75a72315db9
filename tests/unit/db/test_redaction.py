"""What is redacted is gone from the file, and nothing else changes: the chain, lengths, and JSON stay as they were."""

import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.db.scene import HEAD, NOW, Scene, conversation, new_scene

from torpor.core.errors import Conflict, NotFound
from torpor.core.events import Kind
from torpor.core.usage import UsageHider
from torpor.db import answers, blocks, calls, log, notes, outputs, redaction, requests, verify
from torpor.db.call_rows import Chunk
from torpor.db.database import Transaction, open_database
from torpor.db.masking import mask, mask_answer
from torpor.db.notes import Note
from torpor.testing.clock import FakeClock

SECRET = "sk-planted-0123456789abcdef"
PATTERN = re.compile(rb"sk-planted-[0-9a-f]+")
DELTAS = [
    f'data: {{"delta":{{"text":{json.dumps(part)}}}}}\n\n'.encode()
    for part in ("the key is sk-pla", "nted-0123", "45 ok")
]


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    database = await open_database(f"sqlite://{tmp_path}/torpor.db", clock=FakeClock())
    yield await new_scene(database)
    await database.close()


def told(secret: str = SECRET) -> bytes:
    content = [{"type": "text", "text": f"use {secret} " + "x" * 900}]
    return conversation(3).replace(b'"messages":[', b'"messages":[' + json.dumps({"content": content}).encode() + b",")


async def redact(scene: Scene, pattern: re.Pattern[bytes] = PATTERN) -> redaction.Plan:
    def work(tx: Transaction) -> redaction.Plan:
        plan = redaction.plan_pattern(tx, scene.session_id, pattern)
        redaction.apply(tx, **scene.owner, plan=plan, wall_ns=NOW)
        return plan

    plan = await scene.write(work, durable=True)
    await scene.database.settle()
    return plan


async def problems(scene: Scene) -> list[verify.Problem]:
    return await scene.read(lambda tx: verify.verify_chain(tx, scene.session_id))


async def test_redacted_bytes_are_nowhere_in_the_files(scene: Scene, tmp_path: Path) -> None:
    def fill(tx: Transaction) -> None:
        scene.answer(tx, f"first {SECRET}".encode(), body=told())
        scene.answer(tx, b"second", body=told() + b" ")
        outputs.append_output(
            tx, **scene.owner, channel=1, incarnation=0, position=0, data=b"prints sk-planted-01", wall_ns=NOW
        )
        outputs.append_output(
            tx, **scene.owner, channel=1, incarnation=0, position=20, data=b"23 and goes on", wall_ns=NOW
        )

    await scene.write(fill, durable=True)
    await redact(scene)
    await scene.database.close()
    for path in tmp_path.iterdir():
        assert b"sk-planted" not in path.read_bytes(), path.name


async def test_redaction_leaves_the_log_valid_and_every_length(scene: Scene) -> None:
    call_id = await scene.write(lambda tx: scene.answer(tx, b"a ", SECRET.encode(), b" b", body=told()))
    plan = await redact(scene)
    assert len(plan.places) == 2
    assert await problems(scene) == []
    assert await scene.read(lambda tx: verify.count_redacted(tx, scene.session_id)) == 2
    request = await scene.read(lambda tx: requests.read_request(tx, call_id))
    assert request.redacted
    assert request.body == told("*" * len(SECRET))
    chunks = await scene.read(lambda tx: calls.load_chunks(tx, call_id, 1))
    assert [chunk.data for chunk in chunks] == [b"a ", b"*" * len(SECRET), b" b"]


async def test_redacted_request_is_not_given_as_it_was_received(scene: Scene) -> None:
    call_id = await scene.write(lambda tx: scene.answer(tx, body=told()))
    await redact(scene)
    with pytest.raises(Conflict) as refused:
        await scene.read(lambda tx: requests.get_request(tx, call_id))
    assert refused.value.code == "block_redacted"


async def test_what_was_redacted_does_not_come_back_with_the_next_request(scene: Scene) -> None:
    await scene.write(lambda tx: scene.answer(tx, body=told()))
    await redact(scene)
    again = await scene.write(lambda tx: scene.answer(tx, body=told()))
    assert SECRET.encode() not in (await scene.read(lambda tx: requests.read_request(tx, again))).body
    assert await problems(scene) == []


@pytest.mark.parametrize("kind", [Kind.NOTE_ADDED, Kind.AGENT_TOLD])
async def test_the_text_of_a_note_is_erased_and_the_chain_holds(scene: Scene, tmp_path: Path, kind: Kind) -> None:
    text = f"the key is {SECRET}, \ud800 \u00e9"
    event = await scene.write(lambda tx: scene.note(tx, text, kind=kind), durable=True)
    assert await scene.read(lambda tx: notes.read(tx, event)) == Note(text, redacted=False)
    plan = await redact(scene)
    assert [place.partition(":")[0] for place in plan.places] == ["note"]
    masked = Note(text.replace(SECRET, "*" * len(SECRET)), redacted=True)
    assert await scene.read(lambda tx: notes.read(tx, event)) == masked
    assert await problems(scene) == []
    with pytest.raises(Conflict) as refused:
        await scene.read(lambda tx: notes.get(tx, event))
    assert refused.value.code == "block_redacted"
    await scene.database.close()
    for path in tmp_path.iterdir():
        assert SECRET.encode() not in path.read_bytes(), path.name


async def test_a_note_from_before_reads_as_ever_and_redaction_says_that_it_stays(scene: Scene) -> None:
    event = await scene.write(lambda tx: scene.old_note(tx, SECRET))
    await scene.write(lambda tx: scene.answer(tx, SECRET.encode()))
    assert await scene.read(lambda tx: notes.read(tx, event)) == Note(SECRET, redacted=False)
    plan = await redact(scene)
    assert plan.kept == [event.seq]
    assert await scene.read(lambda tx: notes.get(tx, event)) == SECRET
    assert await problems(scene) == []


async def test_a_note_is_erased_by_the_digest_that_its_event_has(scene: Scene) -> None:
    event = await scene.write(lambda tx: scene.note(tx, SECRET))

    def work(tx: Transaction) -> None:
        plan = redaction.plan_block(tx, scene.session_id, bytes.fromhex(event.refs[0]))
        redaction.apply(tx, **scene.owner, plan=plan, wall_ns=NOW)

    await scene.write(work)
    assert (await scene.read(lambda tx: notes.read(tx, event))).text == "*" * len(SECRET)
    assert await problems(scene) == []


async def test_text_that_events_cut_apart_is_found(scene: Scene) -> None:
    call_id = await scene.write(lambda tx: scene.answer(tx, *DELTAS))
    await redact(scene)
    chunks = await scene.read(lambda tx: calls.load_chunks(tx, call_id, 1))
    texts = [json.loads(chunk.data.removeprefix(b"data: "))["delta"]["text"] for chunk in chunks]
    assert texts == ["the key is ******", "*********", "** ok"]


async def test_redaction_of_a_torn_answer_closes_it_first(scene: Scene) -> None:
    def arriving(tx: Transaction) -> None:
        call_id = scene.send(tx, told())
        scene.add_chunks(tx, call_id, SECRET.encode())

    await scene.write(arriving)
    await redact(scene)
    assert await problems(scene) == []
    events = await scene.read(lambda tx: log.events(tx, scene.session_id))
    assert [event.kind for event in events[-2:]] == [Kind.CALL_TORN, Kind.SESSION_REDACTED]


async def test_a_block_is_redacted_by_its_digest(scene: Scene) -> None:
    call_id = await scene.write(lambda tx: scene.answer(tx, b"answer", body=told()))
    largest = max(requests.prepare(told()).pieces, key=len)

    def work(tx: Transaction) -> None:
        for content in (largest, b"answer"):
            plan = redaction.plan_block(tx, scene.session_id, blocks.digest_of(content))
            redaction.apply(tx, **scene.owner, plan=plan, wall_ns=NOW)

    await scene.write(work)
    assert await problems(scene) == []
    body = (await scene.read(lambda tx: requests.read_request(tx, call_id))).body
    assert body == told().replace(largest, b"*" * len(largest))
    assert [chunk.data for chunk in await scene.read(lambda tx: calls.load_chunks(tx, call_id, 1))] == [b"******"]


@pytest.mark.parametrize("pattern", [b"usage", b"null", rb"\d+", b"(?s).+"])
async def test_as_much_of_an_answer_is_hidden_as_before(scene: Scene, pattern: bytes) -> None:
    """An agent may have taken a part of it, without the token counts that only Torpor asked for."""
    pieces = [
        b'data: {"id":1,"usage":null}\n\ndata: {"id":',
        b'2,"usage":null}\n',
        b'\ndata: {"choices":[],"usage":{"n":1}}\n\n',
    ]
    head = replace(HEAD, usage_asked=True)
    call_id = await scene.write(lambda tx: scene.answer(tx, *pieces, head=head))
    await redact(scene, re.compile(pattern))
    chunks = await scene.read(lambda tx: calls.load_chunks(tx, call_id, 1))
    true, masked = UsageHider(), UsageHider()
    assert [len(masked.feed(chunk.data)) for chunk in chunks] == [len(true.feed(piece)) for piece in pieces]
    assert b"".join(chunk.data for chunk in chunks) != b"".join(pieces)
    assert await problems(scene) == []


async def test_a_manifest_cannot_be_redacted(scene: Scene) -> None:
    call_id = await scene.write(lambda tx: scene.answer(tx, body=told()))
    stored = await scene.read(lambda tx: requests.find(tx, call_id))
    assert stored is not None
    for digest, code in ((stored.manifest, Conflict), (b"\0" * 32, NotFound)):
        with pytest.raises(code):
            await scene.read(lambda tx, digest=digest: redaction.plan_block(tx, scene.session_id, digest))


async def test_second_redaction_finds_nothing(scene: Scene) -> None:
    await scene.write(lambda tx: scene.answer(tx, SECRET.encode(), body=told()))
    await redact(scene)
    assert not await scene.read(lambda tx: redaction.plan_pattern(tx, scene.session_id, PATTERN))


@given(st.lists(st.tuples(st.integers(-(2**40), 2**50), st.binary(max_size=300))))
def test_layout_comes_back(rows: list[tuple[int, bytes]]) -> None:
    chunks = [Chunk(number=number, offset_ns=at, data=data) for number, (at, data) in enumerate(rows)]
    assert answers.unpack_layout(answers.pack_layout(chunks)) == [(at, len(data)) for at, data in rows]


# What would also be found in the frame of the text is no secret, and masks the frame.
@given(st.text(), st.text(min_size=1).filter(lambda secret: secret not in '{"text": ""}'), st.text())
def test_masked_json_is_json_of_the_same_length(before: str, secret: str, after: str) -> None:
    body = json.dumps({"text": before + secret + after}).encode()
    masked, _ = mask(body, re.compile(re.escape(json.dumps(secret)[1:-1].encode())))
    assert len(masked) == len(body)
    assert isinstance(json.loads(masked)["text"], str)


@given(st.lists(st.text(alphabet='ab"\\\n\u00e9\u4e2d'), min_size=1), st.sampled_from([b"a", b"b+", b"ab", b"\xc3"]))
def test_masked_events_stay_json(parts: list[str], pattern: bytes) -> None:
    events = [f'{{"text":{json.dumps(part, ensure_ascii=False)}}}' for part in parts]
    body = "\n".join(events).encode()
    masked, _ = mask_answer(body, re.compile(pattern))
    assert len(masked) == len(body)
    for line in masked.split(b"\n"):
        assert isinstance(json.loads(line)["text"], str)
