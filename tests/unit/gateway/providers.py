"""Providers of the tests: what each does with a request is told, and what it read is kept."""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from torpor.config import KeySource, Secret, Upstream
from torpor.gateway.dialects import OPENAI_CHAT
from torpor.gateway.dialects.base import Route
from torpor.gateway.failure import NoAnswer
from torpor.gateway.routing import Destination
from torpor.gateway.upstream import Outgoing, UpstreamClient

KEY = "sk-real-0123456789abcdefghijklmnop"
LENGTH = b"content-length:"
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(serve: Answering, tls: ssl.SSLContext | None = None) -> AsyncGenerator[str]:
    """A server that leaves no connection behind; gives its address."""
    tasks: list[asyncio.Task[None]] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            try:
                await serve(reader, writer)
            finally:
                writer.close()
                await writer.wait_closed()

    async with asyncio.TaskGroup() as group:

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            tasks.append(group.create_task(carry(reader, writer)))

        server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls, limit=1 << 20)
        async with server:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for task in tasks:
            task.cancel()


@dataclass(slots=True)
class Provider:
    """A server that was told what to do with each request; keeps the heads and bodies that it read."""

    answering: Answering
    url: str = ""
    connections: int = 0
    heads: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while not writer.is_closing():
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == LENGTH), 0)
            self.heads.append(head)
            self.bodies.append(await reader.readexactly(length))
            await self.answering(reader, writer)


@asynccontextmanager
async def provider(answering: Answering, tls: ssl.SSLContext | None = None) -> AsyncGenerator[Provider]:
    made = Provider(answering)
    async with listening(made.serve, tls) as address:
        made.url = f"{'https' if tls else 'http'}://{address}"
        yield made


def says(*pieces: bytes, close: bool = False) -> Answering:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if close:
            writer.close()

    return answer


async def says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


def upstream_at(url: str, **fields: float) -> Upstream:
    key = KeySource(value=Secret(KEY))
    return Upstream(name="openai", family="openai", base_url=url, key=key, bearer=True, **fields)  # type: ignore[arg-type]


def outgoing(body: bytes = b"{}", method: str = "POST", **headers: str) -> Outgoing:
    return Outgoing(
        destination=Destination(
            dialect=OPENAI_CHAT, route=Route(path="/v1/chat/completions", is_llm=True), candidates=()
        ),
        model=None,
        method=method,
        query="",
        headers=tuple(headers.items()),
        body=body,
    )


async def ask(client: UpstreamClient, asked: Upstream, request: Outgoing | None = None) -> tuple[int, bytes]:
    """The status and the whole body."""
    async with client.send(request or outgoing(), asked) as answer:
        body = b""
        while data := await answer.next():
            body += data
        return answer.status, body


async def refused(client: UpstreamClient, asked: Upstream, request: Outgoing | None = None) -> str:
    with pytest.raises(NoAnswer) as failed:
        await ask(client, asked, request)
    return failed.value.code
