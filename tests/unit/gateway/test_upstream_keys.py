"""A key goes to its provider's address alone: no redirect takes it elsewhere, and no proxy reads it in the clear."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from torpor.config import KeySource, Secret, Upstream
from torpor.core.clock import SystemClock
from torpor.gateway.dialects import OPENAI_CHAT
from torpor.gateway.dialects.base import Route
from torpor.gateway.failure import NoAnswer
from torpor.gateway.keys import KeyRing
from torpor.gateway.routing import Destination
from torpor.gateway.upstream import Outgoing, UpstreamClient

KEY = "sk-real-0123456789abcdefghijklmnop"


@asynccontextmanager
async def server(answer: bytes, heard: list[bytes]) -> AsyncGenerator[str]:
    """Says the same to everybody, and keeps what it heard."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


async def test_a_key_follows_neither_a_redirect_nor_the_environments_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    provider_heard, other_heard = list[bytes](), list[bytes]()
    async with server(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", other_heard) as other:
        moved = f"HTTP/1.1 307 Moved\r\nlocation: {other}/v1/chat/completions\r\ncontent-length: 0\r\n\r\n"
        async with server(moved.encode(), provider_heard) as provider:
            for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
                monkeypatch.setenv(name, other)
            for name in ("NO_PROXY", "no_proxy"):
                monkeypatch.delenv(name, raising=False)
            upstream = Upstream(
                name="openai", family="openai", base_url=provider, key=KeySource(value=Secret(KEY)), bearer=True
            )
            outgoing = Outgoing(
                destination=Destination(
                    dialect=OPENAI_CHAT,
                    route=Route(path="/v1/chat/completions", is_llm=True),
                    candidates=(upstream,),
                ),
                model=None,
                method="POST",
                query="",
                headers=(("authorization", "Bearer of-the-agent"),),
                body=b"{}",
            )
            async with UpstreamClient(SystemClock()) as client, client.send(outgoing, upstream) as answer:
                assert answer.status == 307
    assert other_heard == []
    [request] = provider_heard
    assert b"Bearer " + KEY.encode() in request
    assert b"of-the-agent" not in request


async def test_what_a_failing_key_command_says_is_not_repeated() -> None:
    noisy = KeySource(command=("sh", "-c", f"echo {KEY} >&2; exit 3"))
    upstream = Upstream(name="openai", family="openai", base_url="http://127.0.0.1:1", key=noisy, bearer=True)
    async with UpstreamClient(SystemClock()) as client:
        with pytest.raises(NoAnswer) as failed:
            await client.key_for(upstream)
    assert failed.value.code == "upstream_key_missing"
    assert KEY not in str(failed.value)


async def test_a_slow_key_commands_words_are_not_repeated_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torpor.gateway.keys.COMMAND_SECONDS", 0.2)
    noisy = KeySource(command=("sh", "-c", f"echo {KEY} >&2; exec sleep 30"))
    upstream = Upstream(name="openai", family="openai", base_url="http://127.0.0.1:1", key=noisy, bearer=True)
    with pytest.raises(Exception, match="command_too_slow") as failed:
        await KeyRing(SystemClock()).key(upstream)
    assert KEY not in str(failed.value)
