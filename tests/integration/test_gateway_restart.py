"""Calls over the death of a node, of a sandbox, and of both: what is paid once, and what an agent is told."""

import asyncio
import json
from pathlib import Path

import pytest
from tests.integration.gateway_stage import Node, gateway_stage, http_request
from tests.integration.test_gateway import CHAT, MESSAGES, answered, body_of, client, question, slow

from torpor.core.call import CallState
from torpor.core.checkpoint import StreamFate
from torpor.core.errors import Superseded
from torpor.core.events import Kind
from torpor.core.redo import RedoSet, entry_of
from torpor.gateway.record import Recorder
from torpor.testing.model_scripts import Answer, Conversation, Pace, Say, Try, long


def slow_at_first(_conversation: Conversation, this: Try) -> Answer:
    """The first attempt is never done while a test runs, the second one at once."""
    pause = 0.05 if this.attempt == 1 else 0.0
    return Answer(
        parts=(Say(text=f"attempt {this.attempt} " + "x" * 2000),), pace=Pace(chunk_seconds=pause, chunk_characters=1)
    )


async def redo_everything(node: Node) -> RedoSet:
    return RedoSet([entry_of(call) for call in await node.calls()])


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_torn_answer_that_nobody_saw_is_asked_for_again_and_that_is_told(tmp_path: Path, path: str) -> None:
    async with gateway_stage(tmp_path, script=slow_at_first) as stage:
        stage.on_call.gate.clear()
        async with stage.node() as node:
            connected = client(stage, http_request(path, question()))
            reader, _ = await connected.__aenter__()
            await node.logged(Kind.CALL_ANSWERING)
        async with stage.node() as node:
            received = await reader.read(-1)
            [call] = await node.calls()
            assert list(node.fates.values()) == [StreamFate.RESEND]
            assert [event.data["attempt"] for event in await node.events(Kind.CALL_TORN)] == [1]
            assert [event.data["attempt"] for event in await node.events(Kind.CALL_SENT)] == [1, 2]
            assert received == await node.logged_response(call)
            assert call.attempts[0].body_bytes > 0  # What came of the first is kept.
            assert [attempt.finished for attempt in call.attempts] == [False, True]
        await connected.__aexit__(None, None, None)
        assert stage.model.witness.requests == 2


async def test_an_agent_that_saw_part_of_a_torn_answer_is_broken_off_and_its_retry_is_the_next_attempt(
    tmp_path: Path,
) -> None:
    async with gateway_stage(tmp_path, script=slow_at_first) as stage:
        async with stage.node() as node:
            connected = client(stage, http_request(CHAT, question()))
            reader, _ = await connected.__aenter__()
            await reader.readuntil(b'"content":"x')
        async with stage.node() as node:
            assert list(node.fates.values()) == [StreamFate.RESET]
            with pytest.raises(ConnectionResetError):
                await reader.read(-1)
            [told] = await node.logged(Kind.STREAM_RESET)
            received = await stage.raw(http_request(CHAT, question()))
            [call] = await node.calls()
            assert told.call_id == call.call_id
            assert received == await node.logged_response(call)
            assert len(call.attempts) == 2
        await connected.__aexit__(None, None, None)
        assert stage.model.witness.requests == 2


async def test_an_answer_goes_on_under_the_next_node_where_the_last_one_stopped(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=long) as stage:
        async with stage.node() as node:
            connected = client(stage, http_request(CHAT, question()))
            reader, _ = await connected.__aenter__()
            beginning = await reader.readexactly(1000)
            await answered(node)
        async with stage.node() as node:
            received = beginning + await reader.read(-1)
            [call] = await node.calls()
            assert list(node.fates.values()) == [StreamFate.DELIVER]
            assert received == await node.logged_response(call)
        await connected.__aexit__(None, None, None)
        assert stage.model.witness.requests == 1


async def test_a_request_that_was_half_sent_is_received_by_the_next_node(tmp_path: Path) -> None:
    request = http_request(CHAT, question("x" * 200_000), {"expect": "100-continue"})
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            connected = client(stage, request[:150_000])
            reader, writer = await connected.__aenter__()
            beginning = await reader.readexactly(25)
        async with stage.node() as node:
            writer.write(request[150_000:])
            received = beginning + await reader.read(-1)
            assert list(node.fates.values()) == [StreamFate.RECEIVE]
            assert received == await node.logged_response((await node.calls())[0])
        await connected.__aexit__(None, None, None)


async def test_a_joined_stream_goes_on_under_the_next_node(tmp_path: Path) -> None:
    """The retry asked for 100 Continue where the first request did not: its bytes are its own."""
    async with gateway_stage(tmp_path, script=slow_at_first) as stage:
        async with stage.node() as node:
            async with client(stage, http_request(CHAT, question())) as (reader, _):
                await reader.readuntil(b'"content":"x')
            await node.logged(Kind.CALL_DELIVERED)
            stage.on_call.gate.clear()
            connected = client(stage, http_request(CHAT, question(), {"expect": "100-continue"}))
            reader, _ = await connected.__aenter__()
            beginning = await reader.readuntil(b'"content":"x')
            assert beginning.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
        async with stage.node() as node:
            assert list(node.fates.values()) == [StreamFate.RESET]
        await connected.__aexit__(None, None, None)


async def test_an_end_that_the_log_lacks_is_told_to_the_next_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node dies between CLOSED and the row: without the end the client's retry would be a second call."""
    heard = asyncio.Event()

    async def never(*_: object) -> None:
        heard.set()
        await asyncio.Event().wait()

    async with gateway_stage(tmp_path) as stage:
        stage.on_call.gate.clear()
        async with stage.node() as node:
            with monkeypatch.context() as patched:
                patched.setattr(Recorder, "deliver", never)
                connected = client(stage, http_request(CHAT, question()))
                _, writer = await connected.__aenter__()
                await node.logged(Kind.CALL_COMPLETED)
                writer.transport.abort()
                await connected.__aexit__(None, None, None)
                stage.on_call.gate.set()
                await heard.wait()
                assert await node.events(Kind.CALL_DELIVERED) == []
        async with stage.node() as node:
            [end] = await node.logged(Kind.CALL_DELIVERED)
            assert end.data["end"] == "gone"
            received = await stage.raw(http_request(CHAT, question()))
            [call] = await node.calls()
            assert received == await node.logged_response(call)
            assert stage.model.witness.requests == 1
            while (await node.link.cut(10)).streams:
                node.link.release()


async def test_the_pump_lives_on_when_the_sandbox_dies_and_the_next_life_gets_its_answer(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=slow) as stage, stage.node() as node:
        async with client(stage, http_request(CHAT, question())) as (reader, _):
            await reader.readuntil(b'"content":"x')
            [call] = await node.calls()
            redo = await redo_everything(node)
            await node.lives[-1].end()
            stage.reboot()
        assert node.gateway.pump_alive(call.call_id)
        await node.live(2, redo)
        received = await stage.raw(http_request(CHAT, question()))
        [call] = await node.calls()
        assert call.state is CallState.ANSWERED
        assert received == await node.logged_response(call)
        [repeated] = await node.events(Kind.CALL_REPEATED)
        assert repeated.call_id == call.call_id
        assert stage.model.witness.requests == 1


async def test_repeated_calls_are_answered_from_the_log_each_once_and_then_asked_anew(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            async with asyncio.TaskGroup() as group:
                asking = [group.create_task(stage.raw(http_request(CHAT, question()))) for _ in range(3)]
            asking_other = await stage.raw(http_request(MESSAGES, question("other")))
            redo = await redo_everything(node)
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo) as node:
            again = await stage.raw(http_request(MESSAGES, question("other")))
            assert again == asking_other
            answers = {await stage.raw(http_request(CHAT, question())) for _ in range(3)}
            assert answers == {task.result() for task in asking}
            assert stage.model.witness.requests == 4
            assert node.gateway.pending_redo() == ()
            new = await stage.raw(http_request(CHAT, question()))
            assert new not in answers
            assert stage.model.witness.requests == 5
            assert len(await node.events(Kind.CALL_REPEATED)) == 4
            assert await node.events(Kind.CALL_DIVERGED) == []


async def test_another_path_is_told_once_and_what_was_paid_for_still_answers(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            first = await stage.raw(http_request(CHAT, question("one")))
            await stage.raw(http_request(CHAT, question("two")))
            redo = await redo_everything(node)
            expected = [call.call_id for call in await node.calls()]
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo) as node:
            await stage.raw(http_request(CHAT, question("another")))
            await stage.raw(http_request(CHAT, question("and another")))
            [diverged] = await node.events(Kind.CALL_DIVERGED)
            assert diverged.data["pending"] == expected
            assert await stage.raw(http_request(CHAT, question("one"))) == first
            assert stage.model.witness.requests == 4


async def test_the_cursor_follows_the_path_that_the_agent_takes(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            await stage.raw(http_request(CHAT, question("one")))
            await stage.raw(http_request(CHAT, question("two")))
            redo = await redo_everything(node)
            one, two = [event.seq for event in await node.events(Kind.CALL_INTENDED)]
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo) as node:
            await stage.raw(http_request(CHAT, question("one")))
            await stage.raw(http_request(CHAT, question("three")))
            three = (await node.events(Kind.CALL_INTENDED))[-1]
            assert three.parent_seq == two  # The cursor stood there, and "one" lies behind it.
            assert (await node.events(Kind.CALL_INTENDED))[1].parent_seq == one


async def test_a_node_that_lost_its_session_writes_and_sends_nothing_more(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        with pytest.raises(BaseExceptionGroup) as failed:
            async with stage.node() as node:
                await stage.acquire(node.database)
                with pytest.raises(ConnectionError):
                    await stage.raw(http_request(CHAT, question()))
        assert failed.group_contains(Superseded)
        assert stage.model.witness.requests == 0


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_retry_without_streaming_gets_the_streamed_answer_in_one_piece(tmp_path: Path, path: str) -> None:
    async with gateway_stage(tmp_path, script=slow) as stage, stage.node() as node:
        async with client(stage, http_request(path, question())) as (reader, _):
            await reader.readuntil(b"x")
        await node.logged(Kind.CALL_DELIVERED)
        received = await stage.raw(http_request(path, question(stream=False)))
        assert b"content-type: application/json" in received
        message = json.loads(body_of(received))
        text = message["content"][0]["text"] if path == MESSAGES else message["choices"][0]["message"]["content"]
        assert text == "attempt 1 " + "x" * 1000
        assert stage.model.witness.requests == 1
        [joined] = await node.events(Kind.CALL_JOINED)
        assert joined.data["shape"] == "message"


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_joined_stream_gets_its_own_shape_from_the_next_node(tmp_path: Path, path: str) -> None:
    async with gateway_stage(tmp_path, script=slow_at_first) as stage:
        async with stage.node() as node:
            async with client(stage, http_request(path, question())) as (reader, _):
                await reader.readuntil(b"x")
            await node.logged(Kind.CALL_DELIVERED)
            connected = client(stage, http_request(path, question(stream=False), {"expect": "100-continue"}))
            reader, _ = await connected.__aenter__()
            beginning = await reader.readexactly(25)
            await node.logged(Kind.CALL_JOINED)
        async with stage.node() as node:
            received = beginning + await reader.read(-1)
            assert list(node.fates.values()) == [StreamFate.RESEND]
            assert received.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
            assert b"attempt 2" in json.dumps(json.loads(body_of(received.partition(b"\r\n\r\n")[2]))).encode()
        await connected.__aexit__(None, None, None)
        assert stage.model.witness.requests == 2


async def test_a_restored_stream_is_known_to_the_node_that_adopts_it_later(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=long) as stage:
        async with stage.node() as node:
            connected = client(stage, http_request(CHAT, question()))
            reader, writer = await connected.__aenter__()
            received = await reader.readexactly(1000)
            await answered(node)
            async with node.gateway.quiet():
                cut = node.gateway.open_streams()
            [call] = await node.calls()
        async with stage.node(incarnation=2, redo=RedoSet(attached=[entry_of(call)]), cut=cut) as node:
            received += await reader.readexactly(1000)
            await node.logged(Kind.CALL_JOINED)
        async with stage.node(incarnation=2) as node:
            received += await reader.read(-1)
            writer.close()
            assert received == await node.logged_response(call)
            [end] = await node.logged(Kind.CALL_DELIVERED)
            assert end.data["end"] == "consumed"
            new = await stage.raw(http_request(CHAT, question()))
            assert new != received
        await connected.__aexit__(None, None, None)
        assert stage.model.witness.requests == 2


async def test_two_forks_of_one_session_never_get_each_others_answers(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        async with stage.node():
            await stage.raw(http_request(CHAT, question()))
        async with stage.fork("one") as one, stage.fork("two") as two, one.node() as first, two.node() as second:
            for asked in (1, 2):
                # The parent's own question, and the same one in both forks at once.
                await asyncio.gather(one.raw(http_request(CHAT, question())), two.raw(http_request(CHAT, question())))
                assert stage.model.witness.requests == 1 + 2 * asked
            for node in (first, second):
                assert [call.state for call in await node.calls()] == [CallState.ANSWERED] * 2
                assert await node.events(Kind.CALL_REPEATED, Kind.CALL_JOINED) == []
