"""The gateway between sockets behind the real relay, a real log, and a scripted model."""

import asyncio
import json
import signal
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.integration.gateway_stage import CLOCK, REAL_KEY, Node, Stage, gateway_stage, http_request

from torpor.config import GATEWAY_PORT
from torpor.core.call import CallState
from torpor.core.events import Kind
from torpor.testing.model_faults import Fault, FaultRule
from torpor.testing.model_scripts import Answer, Conversation, Pace, Say, Try, leaky, long, plain

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
GEMINI, GEMINI_ARRAY = (f"/v1beta/models/m:streamGenerateContent{query}" for query in ("?alt=sse", ""))
PATHS = pytest.mark.parametrize(
    "path",
    [CHAT, MESSAGES, RESPONSES, GEMINI, GEMINI_ARRAY],
    ids=["chat", "messages", "responses", "gemini", "gemini-array"],
)


def question(text: str = "go on", *, stream: bool = True) -> bytes:
    messages = [{"role": "user", "content": text}]
    return json.dumps({"model": "m", "messages": messages, "stream": stream, "max_tokens": 9}).encode()


def slow(_conversation: Conversation, this: Try) -> Answer:
    """Some ten seconds, if nobody ends it before."""
    return Answer(
        parts=(Say(text=f"attempt {this.attempt} " + "x" * 1000),), pace=Pace(chunk_seconds=0.01, chunk_characters=1)
    )


def unhurried(_conversation: Conversation, this: Try) -> Answer:
    """About a second."""
    return Answer(parts=(Say(text=f"{this.attempt}" * 100),), pace=Pace(chunk_seconds=0.01, chunk_characters=1))


@asynccontextmanager
async def client(stage: Stage, request: bytes) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client that has sent a request; leaves with RST at the end, if it did not before."""
    reader, writer = await asyncio.open_connection(stage.address, GATEWAY_PORT)
    try:
        writer.write(request)
        yield reader, writer
    finally:
        writer.transport.abort()


async def answered(node: Node, count: int = 1) -> None:
    await node.logged(Kind.CALL_COMPLETED, count)


def status_of(received: bytes) -> int:
    return int(received.split(b" ", 2)[1])


def body_of(received: bytes) -> bytes:
    """The body of a chunked response."""
    rest, body = received.partition(b"\r\n\r\n")[2], b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body


@PATHS
async def test_what_a_socket_receives_is_what_the_log_says(tmp_path: Path, path: str) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        received = await stage.raw(http_request(path, question()))
        [call] = await node.calls()
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert received == await node.logged_response(call)
        assert call.state is CallState.ANSWERED


async def test_an_answer_larger_than_every_window_passes_whole(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=long) as stage, stage.node() as node:
        received = await stage.raw(http_request(CHAT, question()))
        assert received == await node.logged_response((await node.calls())[0])
        assert len(received) > 262_144


async def test_a_client_that_waits_for_100_continue_gets_it_and_nobody_else(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        received = await stage.raw(http_request(CHAT, question(), {"expect": "100-continue"}))
        assert received.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
        assert received == await node.logged_response((await node.calls())[0])


async def test_an_http_1_0_client_gets_a_body_without_chunks(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        request = http_request(CHAT, question()).replace(b"HTTP/1.1", b"HTTP/1.0")
        received = await stage.raw(request)
        assert b"transfer-encoding" not in received
        assert received.endswith(b"data: [DONE]\n\n")
        assert received == await node.logged_response((await node.calls())[0])


async def test_nothing_is_delivered_before_the_checkpoint_hook_returns(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        stage.on_call.gate.clear()
        async with client(stage, http_request(CHAT, question())) as (reader, _):
            await answered(node)
            [call] = await node.calls()
            assert stage.on_call.calls == [call.call_id]
            status = await node.link.cut(10)
            node.link.release()
            assert [stream.taken for stream in status.streams if stream.kind == "call"] == [0]
            assert [held.call_id for held in node.gateway.open_streams().values()] == [call.call_id]
            stage.on_call.gate.set()
            assert await reader.read(-1) == await node.logged_response(call)


async def test_the_hook_learns_when_the_first_byte_was_ready(tmp_path: Path) -> None:
    """What is held back from then on is what a checkpoint costs the agent."""
    async with gateway_stage(tmp_path, script=unhurried) as stage, stage.node() as node:
        stage.on_call.gate.clear()
        async with client(stage, http_request(CHAT, question())) as (reader, _):
            [first_byte_at] = await stage.on_call.announced(1)
            before = CLOCK.monotonic()
            assert first_byte_at() is None
            await answered(node)
            ready = first_byte_at()
            assert ready is not None
            assert before <= ready <= CLOCK.monotonic()
            stage.on_call.gate.set()
            assert await reader.read(-1)
            assert first_byte_at() == ready


async def test_a_killed_client_does_not_stop_its_answer(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=slow) as stage, stage.node() as node:
        async with client(stage, http_request(MESSAGES, question())) as (reader, _):
            await reader.readuntil(b"message_start")
        [end] = await node.logged(Kind.CALL_DELIVERED)
        assert end.data["end"] == "gone"
        assert node.gateway.pump_alive(end.call_id)
        await answered(node)
        [call] = await node.calls()
        assert call.state is CallState.ANSWERED
        assert stage.model.witness.requests == 1


async def test_a_clients_retry_joins_the_call_and_is_not_sent_again(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=slow) as stage, stage.node() as node:
        async with client(stage, http_request(CHAT, question())) as (reader, _):
            await reader.readuntil(b'"content":"x')
        await node.logged(Kind.CALL_DELIVERED)
        body = b'{"stream": true, "max_tokens": 9, "messages":[{"content":"go on","role":"user"}], "model":"m"}'
        received = await stage.raw(http_request(CHAT, body))
        [call] = await node.calls()
        assert received == await node.logged_response(call)
        assert stage.model.witness.requests == 1
        [joined] = await node.events(Kind.CALL_JOINED)
        assert joined.call_id == call.call_id


@pytest.mark.parametrize("complete", [False, True])
async def test_a_retry_that_comes_together_with_the_end_that_caused_it_joins(tmp_path: Path, complete: bool) -> None:
    async with gateway_stage(tmp_path, script=plain if complete else unhurried) as stage, stage.node() as node:
        stage.on_call.gate.clear()
        async with client(stage, http_request(CHAT, question())) as (_, writer):
            await node.logged(Kind.CALL_COMPLETED if complete else Kind.CALL_SENT)
            stage.on_call.gate.set()
            stage.process.send_signal(signal.SIGSTOP)
            broken: socket.socket = writer.get_extra_info("socket")
            broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            async with client(stage, http_request(CHAT, question())) as (reader, _):
                stage.process.send_signal(signal.SIGCONT)
                received = await reader.read(-1)
        [call] = await node.calls()
        assert received == await node.logged_response(call)
        assert stage.model.witness.requests == 1


async def test_a_retry_after_the_answer_was_complete_joins_as_well(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        stage.on_call.gate.clear()
        async with client(stage, http_request(CHAT, question())):
            await answered(node)
        stage.on_call.gate.set()
        await node.logged(Kind.CALL_DELIVERED)
        received = await stage.raw(http_request(CHAT, question()))
        assert received == await node.logged_response((await node.calls())[0])
        assert stage.model.witness.requests == 1


async def test_a_retry_after_a_refusal_that_was_closed_unread_is_sent(tmp_path: Path) -> None:
    refused = http_request(CHAT, question(), {"x-torpor-fault": Fault.STATUS_500.value})
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        async with client(stage, refused) as (reader, writer):
            assert status_of(await reader.readline()) == 500
            leaving: socket.socket = writer.get_extra_info("socket")
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await node.logged(Kind.CALL_DELIVERED)
        await stage.raw(refused)
        assert stage.model.witness.requests == 2
        assert len(await node.calls()) == 2


async def test_five_equal_requests_at_once_are_five_calls(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        async with asyncio.TaskGroup() as group:
            asking = [group.create_task(stage.raw(http_request(CHAT, question()))) for _ in range(5)]
        answers = {task.result() for task in asking}
        assert len(answers) == 5
        assert stage.model.witness.requests == 5
        assert len(await node.calls()) == 5


async def test_an_equal_request_after_a_consumed_answer_is_a_new_call(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node():
        first = await stage.raw(http_request(CHAT, question()))
        second = await stage.raw(http_request(CHAT, question()))
        assert body_of(first) != body_of(second)
        assert stage.model.witness.requests == 2


BROKEN_OFF = {Fault.RESET_MID, Fault.CLOSE_MID, Fault.CUT_MID, Fault.TRUNCATED_JSON}
BEFORE_BODY = {Fault.DROP, Fault.RESET_BEFORE_HEAD, Fault.GARBAGE, Fault.RESET_AFTER_HEAD}
STATUSES = {Fault.STATUS_500: 500, Fault.STATUS_429: 429, Fault.STATUS_529: 529, Fault.ERROR_EVENT: 200}


@PATHS
@pytest.mark.parametrize("fault", sorted(BROKEN_OFF))
async def test_a_truncated_answer_breaks_the_connection_off(tmp_path: Path, path: str, fault: Fault) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        received = b""
        async with client(stage, http_request(path, question(), {"x-torpor-fault": fault.value})) as (reader, _):
            with pytest.raises(ConnectionResetError):
                while data := await reader.read(65536):
                    received += data
        [call] = await node.calls()
        assert call.state is CallState.FAILED
        assert not call.attempts[-1].finished
        assert (await node.logged_response(call)).startswith(received)
        [failed] = await node.events(Kind.CALL_FAILED)
        assert failed.data["error"].startswith("upstream_")
        # What failed answers nothing: asking once more is a new call.
        assert status_of(await stage.raw(http_request(path, question()))) == 200
        assert stage.model.witness.requests == 2


@PATHS
@pytest.mark.parametrize("fault", sorted(BEFORE_BODY))
async def test_a_provider_that_gives_no_answer_becomes_an_error_in_words(
    tmp_path: Path, path: str, fault: Fault
) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        received = await stage.raw(http_request(path, question(), {"x-torpor-fault": fault.value}))
        [call] = await node.calls()
        assert status_of(received) == 502
        assert b"x-should-retry: true" in received
        error = json.loads(body_of(received))["error"]
        assert "the model provider" in error["message"]
        assert call.state is CallState.FAILED
        assert received == await node.logged_response(call)


@PATHS
@pytest.mark.parametrize("fault", sorted(STATUSES))
async def test_what_a_provider_says_passes_byte_for_byte_even_if_it_is_an_error(
    tmp_path: Path, path: str, fault: Fault
) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        received = await stage.raw(http_request(path, question(), {"x-torpor-fault": fault.value}))
        [call] = await node.calls()
        assert status_of(received) == STATUSES[fault]
        assert call.state is CallState.ANSWERED
        assert received == await node.logged_response(call)
        assert (b"retry-after: 1" in received) == (fault is Fault.STATUS_429)


async def test_a_silent_provider_becomes_a_timeout_in_words(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, read_seconds=0.3) as stage, stage.node():
        received = await stage.raw(http_request(CHAT, question(), {"x-torpor-fault": "silent"}))
        assert status_of(received) == 504


async def test_a_provider_that_refuses_connections_is_tried_again_before_an_error(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        stage.model.refuse()
        received = await stage.raw(http_request(CHAT, question()))
        assert status_of(received) == 502
        [call] = await node.calls()
        assert received == await node.logged_response(call)
        assert len(call.attempts) == 2  # The one that reached nobody, and the gateway's own words.
        assert stage.model.witness.requests == 0


async def test_the_real_key_goes_upstream_and_nowhere_else(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=leaky) as stage:
        received = b""
        async with stage.node() as node:
            for path in (CHAT, MESSAGES, RESPONSES, GEMINI, f"{GEMINI_ARRAY}?key=from-the-sandbox"):
                for stream in (False, True):
                    names = ("x-api-key", "x-goog-api-key", "api-key")
                    headers = {"authorization": "Bearer from-the-sandbox"} | dict.fromkeys(names, "from-the-sandbox")
                    received += await stage.raw(http_request(path, question(stream=stream), headers))
            assert {call.state for call in await node.calls()} == {CallState.ANSWERED}
        assert all(request.credential == REAL_KEY for request in stage.model.requests)
        assert b"*" * len(REAL_KEY) in received
        stored = b"".join(file.read_bytes() for file in tmp_path.glob("torpor.db*"))
        for secret in (REAL_KEY.encode(), b"from-the-sandbox"):
            assert secret not in received
            assert secret not in stored
    assert not any("from-the-sandbox" in f"{request.headers}{request.query}" for request in stage.model.requests)


async def test_headers_and_bodies_reach_the_provider_as_they_were_sent(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node():
        body = b' {"messages" : [{"role":"user","content":"\\u00e9"}] ,"model":"m", "unknown":{"b":1,"a":2.0}}\n'
        headers = {
            "anthropic-version": "2023-06-01",
            "anthropic-beta": "a,b",
            "X-Stainless-Lang": "python",
            "accept-encoding": "gzip, br",
            "connection": "keep-alive, x-drop-me",
            "x-drop-me": "1",
        }
        await stage.raw(http_request("/v1/messages?beta=true", body, headers))
        [request] = stage.model.requests
        assert request.body == body
        sent = request.headers
        assert (sent["anthropic-version"], sent["anthropic-beta"]) == ("2023-06-01", "a,b")
        assert sent["x-stainless-lang"] == "python"
        assert sent["accept-encoding"] == "identity"
        assert "x-drop-me" not in sent


async def test_a_rule_of_the_model_strikes_once_and_the_next_call_succeeds(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        stage.model.faults.add(FaultRule(fault=Fault.STATUS_529, times=1))
        assert status_of(await stage.raw(http_request(CHAT, question()))) == 529
        assert status_of(await stage.raw(http_request(CHAT, question()))) == 200
        assert [call.state for call in await node.calls()] == [CallState.ANSWERED] * 2


async def test_a_retry_joins_while_the_first_stream_is_only_known_to_have_ended_its_request(tmp_path: Path) -> None:
    """A client that timed out before the first byte closes with FIN, which looks like a half-close."""
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        stage.on_call.gate.clear()
        _, writer = await asyncio.open_connection(stage.address, GATEWAY_PORT)
        writer.write(http_request(CHAT, question()))
        await answered(node)
        writer.close()
        await writer.wait_closed()
        async with client(stage, http_request(CHAT, question())) as (reader, _):
            await node.logged(Kind.CALL_JOINED)
            stage.on_call.gate.set()
            received = await reader.read(-1)
        [call] = await node.calls()
        assert received == await node.logged_response(call)
        ends = await node.logged(Kind.CALL_DELIVERED, 2)
        assert sorted(event.data["end"] for event in ends) == ["consumed", "gone"]
        assert stage.model.witness.requests == 1
        # Whichever of the two ended last: the answer was consumed, so the next equal request is a new call.
        await stage.raw(http_request(CHAT, question()))
        assert stage.model.witness.requests == 2


async def test_equal_requests_one_after_the_other_are_new_calls_however_fast_they_come(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        answers = {await stage.raw(http_request(CHAT, question())) for _ in range(20)}
        assert len(answers) == 20
        assert stage.model.witness.requests == 20
        assert await node.events(Kind.CALL_JOINED) == []


async def test_a_client_that_half_closed_and_waits_gets_its_answer(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        async with client(stage, http_request(CHAT, question())) as (reader, writer):
            writer.write_eof()
            received = await reader.read(-1)
        [call] = await node.calls()
        assert received == await node.logged_response(call)
        # It has consumed its answer, so the next one is a new call.
        await node.logged(Kind.CALL_DELIVERED)
        await stage.raw(http_request(CHAT, question()))
        assert stage.model.witness.requests == 2
