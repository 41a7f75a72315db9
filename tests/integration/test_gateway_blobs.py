"""Requests and answers of many megabytes through the gateway: in the store, not in the database, and as good as any."""

import asyncio
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from tests.integration.gateway_stage import Node, Stage, gateway_stage, http_request
from tests.integration.test_gateway import CHAT, answered, body_of, client, question, status_of
from tests.integration.test_gateway_restart import redo_everything
from tests.unit.db.blob_scene import MIB, flip_byte, noise, path_of
from tests.unit.snapshots.making import tiny_disk_at

from torpor.core.call import Call, CallState
from torpor.core.checkpoint import StreamFate
from torpor.core.divergence import OnDivergence
from torpor.core.errors import MachineUnfit
from torpor.core.events import Kind
from torpor.core.redo import RedoSet
from torpor.db import blobs, requests, verify
from torpor.db.database import Transaction
from torpor.gateway.crossroads import Crossroads
from torpor.testing.model_faults import Fault, FaultRule
from torpor.testing.model_scripts import Answer, Conversation, Pace, Say, Try, huge

TEXT = noise(3 * MIB).decode()
LARGE = http_request(CHAT, question(TEXT))


def larger_when_asked_for_more(conversation: Conversation, this: Try) -> Answer:
    """Two megabytes and more; a sentence for everything else."""
    if "more" not in conversation.last_text:
        return Answer(parts=(Say(text=f"attempt {this.attempt} ({this.nonce})"),))
    text = f"attempt {this.attempt} ({this.nonce}) {noise(2 * MIB, hash(this.nonce)).decode()}"
    return Answer(parts=(Say(text=text),), pace=Pace(chunk_characters=50_000))


def huge_and_slow_at_first(conversation: Conversation, this: Try) -> Answer:
    """The first attempt takes so long that a node can be stopped in its middle."""
    answer = huge(conversation, this)
    return replace(answer, pace=replace(answer.pace, chunk_seconds=0.02 if this.attempt == 1 else 0.0))


async def until(node: Node, happened: Callable[[], bool]) -> None:
    """Look again after each write."""
    while True:
        written = node.database.writes
        if happened():
            return
        while node.database.writes == written:
            await node.database.written.wait()


def rows(stage: Stage, statement: str) -> int:
    with closing(sqlite3.connect(stage.directory / "torpor.db")) as connection:
        return connection.execute(statement).fetchone()[0]


async def named(stage: Stage) -> list[str]:
    """The keys that rows name, which are all that are there."""
    database = await stage.open_database()
    keys = sorted(await database.read(blobs.list_named))
    assert await database.read(lambda tx: verify.verify_chain(tx, stage.session_id)) == []
    await database.close()
    assert stage.blobs.list("blobs/") == keys
    return keys


async def answer_blob(stage: Stage, call: Call) -> Path:
    """Where the answer of a call lies."""

    def find(tx: Transaction) -> bytes:
        row = tx.one("call/find_answer", call_id=call.call_id, attempt=call.attempts[-1].number)
        assert row is not None
        return row["blob"]

    database = await stage.open_database()
    digest = await database.read(find)
    await database.close()
    return path_of(stage.directory, blobs.key_of(stage.session_id, digest))


async def test_three_megabytes_asked_and_twenty_answered(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=huge) as stage:
        async with stage.node() as node:
            received = await stage.raw(LARGE)
            [call] = await node.calls()
            assert call.attempts[-1].body_bytes > 20_000_000
            assert received == await node.logged_response(call)
            _, body = await node.database.read(lambda tx: requests.get_request(tx, call.call_id))
            assert body == question(TEXT)
            # What Torpor added to learn the token counts stands in front.
            assert stage.model.requests[-1].body.endswith(body.removeprefix(b"{"))
            await until(node, lambda: rows(stage, "SELECT COUNT(*) FROM chunk") == 0)
        assert len(await named(stage)) == 2
        assert rows(stage, "SELECT SUM(length(data)) FROM block") < 10_000
        assert rows(stage, "SELECT SUM(length(data)) FROM answer") == 0


async def test_a_restored_agent_gets_its_large_answer_again_and_nobody_is_asked(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=huge) as stage:
        async with stage.node() as node:
            first = await stage.raw(LARGE)
            redo = await redo_everything(node)
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo) as node:
            assert await stage.raw(LARGE) == first
            assert await node.events(Kind.CALL_DIVERGED) == []
        assert stage.model.witness.requests == 1
        assert len(await named(stage)) == 2


async def test_a_conversation_around_a_large_text_stores_it_once(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        for number in range(3):
            said = [{"role": "user", "content": TEXT}, *({"role": "user", "content": str(n)} for n in range(number))]
            body = json.dumps({"model": "m", "messages": said, "stream": True}).encode()
            assert status_of(await stage.raw(http_request(CHAT, body))) == 200
        assert len(await node.calls()) == 3
        assert len(stage.blobs.list("blobs/")) == 1


async def test_what_came_of_a_large_answer_that_broke_off_is_kept(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=huge) as stage:
        stage.model.faults.add(FaultRule(fault=Fault.CLOSE_MID))
        async with stage.node() as node:
            with pytest.raises(ConnectionResetError):
                await stage.raw(LARGE)
            await node.logged(Kind.CALL_FAILED)
        assert len(await named(stage)) == 2


async def test_a_large_answer_that_is_torn_is_kept_and_asked_for_again(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=huge_and_slow_at_first) as stage:
        stage.on_call.gate.clear()
        async with stage.node() as node:
            connected = client(stage, LARGE)
            reader, _ = await connected.__aenter__()
            await until(node, lambda: rows(stage, "SELECT TOTAL(length(data)) FROM chunk") > 5_000_000)
        stage.on_call.gate.set()
        async with stage.node() as node:
            received = await reader.read(-1)
            [call] = await node.calls()
            assert list(node.fates.values()) == [StreamFate.RESEND]
            assert received == await node.logged_response(call)
            assert call.attempts[0].body_bytes > 5_000_000
            assert not call.attempts[0].finished
        await connected.__aexit__(None, None, None)
        assert len(await named(stage)) == 3


# --- damage -------------------------------------------------------------------------------------------------------


async def lived_with_damage(stage: Stage, *, vanished: bool) -> RedoSet:
    """Three calls in a first life; the second one's answer is damaged since."""
    async with stage.node() as node:
        for text in ("one", "two, more", "three, more"):
            await stage.raw(http_request(CHAT, question(text)))
        made = await node.calls()
        redo = await redo_everything(node)
    path = await answer_blob(stage, made[1])
    if vanished:
        path.unlink()
    else:
        flip_byte(path)
    stage.reboot()
    return redo


@pytest.mark.parametrize("vanished", [False, True], ids=["flipped", "vanished"])
async def test_a_call_whose_answer_is_damaged_is_made_anew_and_the_others_are_repeated(
    tmp_path: Path, vanished: bool
) -> None:
    async with gateway_stage(tmp_path, script=larger_when_asked_for_more) as stage:
        redo = await lived_with_damage(stage, vanished=vanished)
        async with stage.node(incarnation=2, redo=redo) as node:
            first, second, third = (await node.calls())[:3]
            assert await stage.raw(http_request(CHAT, question("one"))) == await node.logged_response(first)
            again = await stage.raw(http_request(CHAT, question("two, more")))
            [left] = await node.events(Kind.CALL_DIVERGED)
            assert left.data["pending"] == [second.call_id, third.call_id]
            assert await stage.raw(http_request(CHAT, question("three, more"))) == await node.logged_response(third)
            *_, new = await node.calls()
            assert again == await node.logged_response(new)
            assert stage.model.witness.requests == 4
        async with stage.node(incarnation=2) as node:  # adopts, and knows what became of it
            assert status_of(await stage.raw(http_request(CHAT, question("four")))) == 200
            assert len(await node.events(Kind.CALL_DIVERGED)) == 1
            found = await node.database.read(lambda tx: verify.verify_chain(tx, stage.session_id))
            assert [problem.code for problem in found] == ["response_changed"]


async def test_the_policy_decides_about_a_call_whose_answer_is_damaged(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=larger_when_asked_for_more) as stage:
        redo = await lived_with_damage(stage, vanished=True)
        crossroads = Crossroads(OnDivergence.ASK)
        async with stage.node(incarnation=2, redo=redo, crossroads=crossroads) as node:
            async with client(stage, http_request(CHAT, question("two, more"))) as (reader, _):
                assert await crossroads.reached() == f"POST {CHAT}"
                assert len(await node.calls()) == 3
                crossroads.go_on()
                assert status_of(await reader.read(-1)) == 200
            assert len(await node.calls()) == 4


async def test_an_agent_that_holds_a_part_of_a_damaged_answer_is_broken_off_and_its_retry_is_a_new_call(
    tmp_path: Path,
) -> None:
    async with gateway_stage(tmp_path, script=huge) as stage:
        async with stage.node() as node:
            connected = client(stage, http_request(CHAT, question()))
            reader, _ = await connected.__aenter__()
            await reader.readexactly(1000)
            await answered(node)
            [call] = await node.calls()
            await until(node, lambda: rows(stage, "SELECT COUNT(*) FROM chunk") == 0)
        flip_byte(await answer_blob(stage, call))
        async with stage.node() as node:
            with pytest.raises(ConnectionResetError):
                await reader.read(-1)
            [told] = await node.logged(Kind.STREAM_RESET)
            assert told.call_id == call.call_id
            received = await stage.raw(http_request(CHAT, question()))
            assert received == await node.logged_response((await node.calls())[-1])
        await connected.__aexit__(None, None, None)
        assert stage.model.witness.requests == 2


async def test_a_damaged_request_that_was_to_be_sent_again_is_told_to_its_client(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        stage.model.faults.add(FaultRule(fault=Fault.SILENT, contains=TEXT[:40]))
        async with stage.node() as node:
            connected = client(stage, LARGE)
            reader, _ = await connected.__aenter__()
            await node.logged(Kind.CALL_SENT)
        [key] = stage.blobs.list("blobs/")
        flip_byte(path_of(stage.directory, key))
        async with stage.node() as node:
            received = await reader.read(-1)
            assert status_of(received) == 502
            assert json.loads(body_of(received))["error"]["code"] == "request_damaged"
            [call] = await node.calls()
            assert call.state is CallState.FAILED
            assert status_of(await stage.raw(http_request(CHAT, question("another")))) == 200
        await connected.__aexit__(None, None, None)


# --- no room ------------------------------------------------------------------------------------------------------


async def test_a_request_that_finds_no_room_is_received_again_when_there_is_some(tmp_path: Path) -> None:
    """The node ends, as it does when the database has no room; init keeps the request for the next one."""
    async with gateway_stage(tmp_path) as stage:
        with tiny_disk_at(tmp_path / "tiny") as disk:
            stage.store = disk
            connected = client(stage, LARGE)
            with pytest.raises(ExceptionGroup) as ended:
                async with stage.node() as node:
                    reader, _ = await connected.__aenter__()
                    await asyncio.gather(*node.lives[0].tasks)
            assert ended.group_contains(MachineUnfit, match="No space left")
            assert disk.joinpath("blobs").exists()
            assert stage.blobs.list("blobs/") == []
        stage.store = None
        async with stage.node() as node:
            received = await reader.read(-1)
            [call] = await node.calls()
            assert received == await node.logged_response(call)
            assert list(node.fates.values()) == [StreamFate.RECEIVE]
        await connected.__aexit__(None, None, None)
        assert stage.model.witness.requests == 1
        assert len(await named(stage)) == 1


async def test_an_answer_that_finds_no_room_in_the_store_is_delivered_and_stays_in_rows(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=huge) as stage:
        with tiny_disk_at(tmp_path / "tiny") as disk:
            stage.store = disk
            async with stage.node() as node:
                received = await stage.raw(http_request(CHAT, question()))
                [call] = await node.calls()
                assert call.state is CallState.ANSWERED
                assert received == await node.logged_response(call)
            assert await named(stage) == []
        assert rows(stage, "SELECT SUM(length(data)) FROM chunk") > 20_000_000
