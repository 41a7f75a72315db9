"""Connections to providers: what is sent over them, how an exchange ends, which of them are used again."""

import asyncio
from dataclasses import replace

import pytest
from tests.unit.gateway.providers import (
    KEY,
    LENGTH,
    WHOLE,
    Answering,
    ask,
    listening,
    outgoing,
    provider,
    refused,
    says,
    says_nothing,
    upstream_at,
)

from torpor.core.clock import SystemClock
from torpor.gateway import connection, connections, upstream
from torpor.gateway.failure import NoAnswer
from torpor.gateway.upstream import UpstreamClient

# --- an exchange --------------------------------------------------------------------------------------------------


async def test_a_request_is_written_as_it_was_made_with_the_key_instead_of_the_agents() -> None:
    async with provider(says(WHOLE)) as served, UpstreamClient(SystemClock()) as client:
        request = outgoing(b'{"a": 1}', **{"X-Odd-Case": "v", "authorization": "Bearer no", "connection": "x-odd"})
        assert await ask(client, upstream_at(served.url), replace(request, query="q=1")) == (200, b"ok")
    [head] = served.heads
    assert head.splitlines()[0] == b"POST /chat/completions?q=1 HTTP/1.1"
    host = served.url.removeprefix("http://").encode()
    fields = dict(line.split(b": ", 1) for line in head.splitlines()[1:] if line)
    assert fields == {
        b"host": host,
        b"X-Odd-Case": b"v",
        b"accept-encoding": b"identity",
        b"authorization": b"Bearer " + KEY.encode(),
        b"content-length": b"8",
    }
    assert served.bodies == [b'{"a": 1}']


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_request_without_a_body_says_no_length(method: str) -> None:
    no_body = b"HTTP/1.1 204 No Content\r\n\r\n"
    async with provider(says(no_body)) as served, UpstreamClient(SystemClock()) as client:
        assert await ask(client, upstream_at(served.url), outgoing(b"", method)) == (204, b"")
        assert await ask(client, upstream_at(served.url), outgoing(b"", "POST")) == (204, b"")
    assert [LENGTH in head.lower() for head in served.heads] == [False, True]


@pytest.mark.parametrize(
    ("pieces", "body"),
    [
        ((b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n", WHOLE), b"ok"),
        ((b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n", b"1\r\nk\r\n0\r\n\r\n"), b"ok"),
        ((b"HTTP/1.0 200 OK\r\n\r\no", b"k"), b"ok"),
        ((b"HTTP/1.1 200\r\ncontent-length: 0\r\n\r\n",), b""),
    ],
    ids=["interim", "chunked", "to the end of the connection", "no phrase"],
)
async def test_an_answer_of_any_framing_is_read(pieces: tuple[bytes, ...], body: bytes) -> None:
    answering = says(*pieces, close=pieces[0][:8] == b"HTTP/1.0")
    async with (
        provider(answering) as served,
        UpstreamClient(SystemClock()) as client,
        client.send(outgoing(), upstream_at(served.url)) as answer,
    ):
        assert (answer.status, answer.reason) == (200, "OK")
        got = b""
        while data := await answer.next():
            got += data
        assert got == body


@pytest.mark.parametrize(
    ("answering", "code"),
    [
        (says(b"220 smtp ready\r\n\r\n"), "upstream_broke_off"),
        (says(b"HTTP/1.1 200 OK\r\n", close=True), "upstream_broke_off"),
        (says(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", close=True), "upstream_broke_off"),
        (says(b"HTTP/1.1 200 OK\r\nx: " + b"a" * (connection.HEAD_BYTES_MAX + 9)), "upstream_broke_off"),
        (says_nothing, "upstream_silent"),
    ],
    ids=["not HTTP", "no whole head", "no whole body", "endless head", "silence"],
)
async def test_an_exchange_without_a_whole_answer_says_why(answering: Answering, code: str) -> None:
    async with provider(answering) as served, UpstreamClient(SystemClock()) as client:
        assert await refused(client, upstream_at(served.url, read_seconds=0.3)) == code


async def test_what_came_of_an_answer_that_breaks_off_is_given_first() -> None:
    half = says(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", close=True)
    async with (
        provider(half) as served,
        UpstreamClient(SystemClock()) as client,
        client.send(outgoing(), upstream_at(served.url)) as answer,
    ):
        assert await answer.next() == b"half"
        with pytest.raises(NoAnswer):
            await answer.next()


async def test_a_provider_that_reads_slowly_is_not_silent() -> None:
    body = b"x" * (64 << 20)  # more than the kernel takes off our hands
    read = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        while len(read) < len(body):
            await asyncio.sleep(0.02)
            read.extend(await reader.read(1 << 20))
        writer.write(WHOLE)
        writer.close()

    async with listening(serve) as address, UpstreamClient(SystemClock()) as client:
        asked = upstream_at(f"http://{address}", read_seconds=0.9)
        assert await ask(client, asked, outgoing(body)) == (200, b"ok")
    assert read == body


async def test_a_request_that_cannot_be_written_down_is_not_sent() -> None:
    async with provider(says(WHOLE)) as served, UpstreamClient(SystemClock()) as client:
        assert await refused(client, upstream_at(served.url), outgoing(x="a\nb")) == "upstream_misused"
        assert served.heads == []


async def test_a_provider_waits_while_the_log_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ARRIVED_BYTES_MAX", 1 << 16)
    size = 16 << 20
    written = 0

    async def pour(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(size >> 16):
            writer.write(b"x" * (1 << 16))
            await writer.drain()
            written += 1 << 16

    async with (
        provider(pour) as served,
        UpstreamClient(SystemClock()) as client,
        client.send(outgoing(), upstream_at(served.url, read_seconds=30)) as answer,
    ):
        seen = -1
        while seen != written:  # until nothing more goes
            seen = written
            await asyncio.sleep(0.1)
        assert written < size
        body = b""
        while data := await answer.next():
            body += data
        assert len(body) == size


# --- which connection ---------------------------------------------------------------------------------------------


async def test_a_connection_is_used_again() -> None:
    async with provider(says(WHOLE)) as served, UpstreamClient(SystemClock()) as client:
        for _ in range(3):
            assert await ask(client, upstream_at(served.url)) == (200, b"ok")
        assert served.connections == 1


async def test_calls_at_once_have_connections_of_their_own() -> None:
    async with (
        provider(says(WHOLE)) as served,
        UpstreamClient(SystemClock()) as client,
        client.send(outgoing(), upstream_at(served.url)),
        client.send(outgoing(), upstream_at(served.url)),
    ):
        assert served.connections == 2


@pytest.mark.parametrize(
    "answering",
    [
        says(WHOLE, close=True),
        says(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"),
        says(WHOLE + b"HTTP/1.1 200 OK\r\n"),
    ],
    ids=["it was closed", "it will be closed", "it said more than was asked"],
)
async def test_a_connection_that_is_not_as_it_should_be_is_not_used_again(answering: Answering) -> None:
    async with provider(answering) as served, UpstreamClient(SystemClock()) as client:
        for _ in range(3):
            assert await ask(client, upstream_at(served.url)) == (200, b"ok")
        assert served.connections == 3


async def test_an_answer_that_is_left_in_the_middle_takes_its_connection_along() -> None:
    first = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"
    async with provider(says(first)) as served, UpstreamClient(SystemClock()) as client:
        for _ in range(2):
            async with client.send(outgoing(), upstream_at(served.url)) as answer:
                assert await answer.next() == b"half"
        assert served.connections == 2


async def test_a_refusal_that_is_read_away_leaves_its_connection_for_the_next_try() -> None:
    refusal = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nlate"
    async with provider(says(refusal[:-2], refusal[-2:])) as served, UpstreamClient(SystemClock()) as client:
        for _ in range(2):
            async with client.send(outgoing(), upstream_at(served.url)) as answer:
                await answer.discard()
        assert served.connections == 1


async def test_an_idle_connection_is_closed_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.05)
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE)
        await reader.read()
        closed.set()

    async with provider(serve) as served, UpstreamClient(SystemClock()) as client:
        assert await ask(client, upstream_at(served.url)) == (200, b"ok")
        await closed.wait()


async def test_a_connection_that_was_reached_ahead_carries_nothing_until_it_is_used() -> None:
    async with provider(says(WHOLE)) as served, UpstreamClient(SystemClock()) as client:
        asked = upstream_at(served.url)
        unused = client.reach(asked)
        await unused.connection()
        assert served.heads == []
        unused.end()
        reached = client.reach(asked)
        async with client.send(outgoing(), asked, reached=reached) as answer:
            assert answer.status == 200
        assert (served.connections, len(served.heads)) == (1, 1)


async def test_a_reached_connection_that_the_provider_closed_meanwhile_is_made_anew() -> None:
    async with provider(says(WHOLE)) as served, UpstreamClient(SystemClock()) as client:
        asked = upstream_at(served.url)
        assert await ask(client, asked) == (200, b"ok")
        reached = client.reach(asked)
        (await reached.connection()).close()
        async with client.send(outgoing(), asked, reached=reached) as answer:
            assert answer.status == 200
        assert served.connections == 2


async def test_an_address_where_nobody_listens_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "CONNECT_RETRY_SECONDS", (0.0, 0.0))
    async with provider(says(WHOLE)) as served:
        pass
    tried: list[str] = []
    make = connections.Connections.make
    monkeypatch.setattr(connections.Connections, "make", lambda self, *where: tried.append("") or make(self, *where))
    async with UpstreamClient(SystemClock()) as client:
        assert await refused(client, upstream_at(served.url)) == "upstream_unreachable"
    assert len(tried) == 3
