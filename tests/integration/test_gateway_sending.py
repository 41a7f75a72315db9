"""From a request to its sending: one commit, nothing of it outside before, and no way back after."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.integration.gateway_stage import Node, gateway_stage, http_request
from tests.integration.test_gateway import CHAT, answered, client, question, status_of

from torpor.core.call import Call, CallState
from torpor.core.events import Kind
from torpor.gateway.intake import Intake


def around_intents(node: Node, step: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]) -> None:
    """Let a test stand around each write that makes a call."""
    write = node.database.write

    async def stepped(work: Callable[..., Any], /, *, durable: bool, brief: bool = False) -> Any:
        def commit() -> Awaitable[Any]:
            return write(work, durable=durable, brief=brief)

        return await (step(commit) if durable else commit())

    node.database.write = stepped  # type: ignore[method-assign]


async def test_intent_and_sending_are_one_commit(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        states: list[CallState] = []

        async def step(commit: Callable[[], Awaitable[Any]]) -> Any:
            result = await commit()
            if isinstance(result, Call):
                states.append(result.state)
            return result

        around_intents(node, step)
        async with client(stage, http_request(CHAT, question())):
            await node.logged(Kind.CALL_SENT)
            assert states == [CallState.SENT]
            [intended], [sent] = await node.events(Kind.CALL_INTENDED), await node.events(Kind.CALL_SENT)
            assert (sent.seq, sent.wall_ns) == (intended.seq + 1, intended.wall_ns)
            assert sent.data["attempt"] == 1


async def test_a_budget_keeps_them_apart(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, budget="1") as stage, stage.node() as node:
        states: list[CallState] = []

        async def step(commit: Callable[[], Awaitable[Any]]) -> Any:
            result = await commit()
            if isinstance(result, Call):
                states.append(result.state)
            return result

        around_intents(node, step)
        body = question().replace(b'"m"', b'"scripted-large"')
        assert status_of(await stage.raw(http_request(CHAT, body))) == 200
        assert states == [CallState.INTENDED]
        [sent] = await node.events(Kind.CALL_SENT)
        assert "reserved" in sent.data


async def test_nothing_of_a_request_leaves_before_it_is_on_disk(tmp_path: Path) -> None:
    """The connection is made meanwhile: what passes over it begins when the commit has returned."""
    connected, go_on, left = asyncio.Event(), asyncio.Event(), asyncio.Event()
    read: list[tuple[bool, bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        data = await reader.read(4)
        read.append((go_on.is_set(), data))
        writer.write(b"HTTP/1.1 418 No\r\ncontent-length: 0\r\nx-should-retry: false\r\n\r\n")
        with suppress(ConnectionError):
            await reader.read()
        writer.close()
        left.set()

    async def step(commit: Callable[[], Awaitable[Any]]) -> Any:
        result = await commit()
        if isinstance(result, Call):
            await connected.wait()
            go_on.set()
        return result

    provider = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with provider, gateway_stage(tmp_path) as stage:
        url = f"http://127.0.0.1:{provider.sockets[0].getsockname()[1]}/v1"
        stage.upstreams = tuple(replace(upstream, base_url=url) for upstream in stage.upstreams)
        async with stage.node() as node:
            around_intents(node, step)
            assert status_of(await stage.raw(http_request(CHAT, question()))) == 418
        await left.wait()
    assert read == [(True, b"POST")]


async def test_a_call_that_the_log_has_as_sent_is_sent_though_its_stream_is_gone(tmp_path: Path) -> None:
    """The sandbox dies as the commit is made: who served the stream is cancelled, and the call goes on."""
    async with gateway_stage(tmp_path) as stage, stage.node() as node:

        async def step(commit: Callable[[], Awaitable[Any]]) -> Any:
            result = await commit()
            if isinstance(result, Call):
                for task in node.lives[-1].tasks:
                    task.cancel()
                await asyncio.sleep(0)
            return result

        around_intents(node, step)
        async with client(stage, http_request(CHAT, question())):
            await answered(node)
        [call] = await node.calls()
        assert call.state is CallState.ANSWERED
        assert stage.model.witness.requests == 1


async def test_calls_that_do_not_concern_each_other_are_recorded_together(tmp_path: Path) -> None:
    """Five requests at once, three of them equal, wait for one commit; then each is sent once."""
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        arrived, go_on = asyncio.Semaphore(0), asyncio.Event()

        async def step(commit: Callable[[], Awaitable[Any]]) -> Any:
            arrived.release()
            await go_on.wait()
            return await commit()

        around_intents(node, step)
        asking = [
            asyncio.create_task(stage.raw(http_request(CHAT, question(text)))) for text in ("a", "b", "b", "b", "c")
        ]
        for _ in asking:
            await arrived.acquire()
        assert stage.model.requests == []
        go_on.set()
        received = await asyncio.gather(*asking)
        assert [status_of(answer) for answer in received] == [200] * 5
        assert stage.model.witness.requests == 5
        calls = await node.calls()
        assert sorted(received) == sorted([await node.logged_response(call) for call in calls])
        intended = await node.events(Kind.CALL_INTENDED)
        assert [event.parent_seq for event in intended[1:]] == [event.seq for event in intended[:-1]]


async def test_a_retry_waits_until_the_call_of_the_client_that_left_is_recorded(tmp_path: Path) -> None:
    """The first client gives up while its call is being written: its retry is the same call, not a second one."""
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        arrived, go_on = asyncio.Event(), asyncio.Event()

        async def step(commit: Callable[[], Awaitable[Any]]) -> Any:
            arrived.set()
            await go_on.wait()
            return await commit()

        around_intents(node, step)
        async with client(stage, http_request(CHAT, question())):
            await arrived.wait()
        await until_left(node)
        judged: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        concerns_others = node.gateway._concerns_others

        def judge(intake: Intake) -> bool:
            judged.set_result(concerns_others(intake))
            return judged.result()

        node.gateway._concerns_others = judge  # type: ignore[method-assign]
        retry = asyncio.create_task(stage.raw(http_request(CHAT, question())))
        assert await judged
        go_on.set()
        assert status_of(await retry) == 200
        assert len(await node.calls()) == 1
        assert stage.model.witness.requests == 1


async def until_left(node: Node) -> None:
    """Wait until the host knows that the first client has ended its side of the connection."""
    [stream] = [stream for stream in node.link._streams.values() if stream.kind == "call"]
    while not stream.half_closed:
        await stream._changed.wait()
