"""Connections to providers: what is sent over them, how an exchange ends, which of them are used again, and the way."""

import asyncio
import base64
import datetime as dt
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from torpor.config import KeySource, Secret, Upstream
from torpor.core.clock import SystemClock
from torpor.gateway import connection, connections, upstream
from torpor.gateway.dialects import OPENAI_CHAT
from torpor.gateway.dialects.base import Route
from torpor.gateway.failure import NoAnswer
from torpor.gateway.routing import Destination
from torpor.gateway.upstream import Outgoing, UpstreamClient

KEY = "sk-real-0123456789abcdefghijklmnop"
LENGTH = b"content-length:"
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
PROXIES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")
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


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


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


# --- the way ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that vouches for itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "provider")])
    now = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now.replace(year=2120))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("authority") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return path


@pytest.fixture
def tls(authority: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A provider's; the client trusts it."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


@dataclass(slots=True)
class Proxy:
    url: str = ""
    asked: list[bytes] = field(default_factory=list)
    passed: bytearray = field(default_factory=bytearray)


@asynccontextmanager
async def proxy(answer: bytes = b"HTTP/1.1 200 Connection established\r\n\r\n") -> AsyncGenerator[Proxy]:
    """Tunnels, and keeps what passes towards the provider."""
    made = Proxy()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray) -> None:
        while data := await reader.read(65536):
            kept += data
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        made.asked.append(head)
        writer.write(answer)
        if b" 200 " not in answer:
            return
        host, _, port = head.split(b" ")[1].decode().rpartition(":")
        there, back = await asyncio.open_connection(host, int(port))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(copy(reader, back, made.passed))
                group.create_task(copy(there, writer, bytearray()))
        except* ConnectionError:
            pass
        finally:
            back.close()
            with suppress(ConnectionError):
                await back.wait_closed()

    async with listening(serve) as address:
        made.url = address
        yield made


async def test_https_is_spoken_with_whom_the_authorities_vouch_for(tls: ssl.SSLContext) -> None:
    spoken: list[str | None] = []

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        spoken.append(writer.get_extra_info("ssl_object").selected_alpn_protocol())
        writer.write(WHOLE)

    async with provider(answer, tls) as served, UpstreamClient(SystemClock()) as client:
        for _ in range(2):
            assert await ask(client, upstream_at(served.url)) == (200, b"ok")
        assert (spoken, served.connections) == (["http/1.1"] * 2, 1)


async def test_a_provider_that_nobody_vouches_for_gets_no_request(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "CONNECT_RETRY_SECONDS", ())
    monkeypatch.delenv("SSL_CERT_FILE")
    async with provider(says(WHOLE), tls) as served, UpstreamClient(SystemClock()) as client:
        assert await refused(client, upstream_at(served.url)) == "upstream_unreachable"
        assert served.heads == []


@pytest.mark.parametrize("login", ["", "me:p%40ss@"])
async def test_a_proxy_of_the_environment_sees_only_where_https_goes(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, login: str
) -> None:
    async with proxy() as between, provider(says(WHOLE), tls) as served:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{login}{between.url}")
        async with UpstreamClient(SystemClock()) as client:
            for _ in range(2):
                assert await ask(client, upstream_at(served.url)) == (200, b"ok")
    [asked] = between.asked
    authority = served.url.removeprefix("https://").encode()
    assert asked.splitlines()[:2] == [b"CONNECT " + authority + b" HTTP/1.1", b"host: " + authority]
    assert (b"proxy-authorization: Basic " + base64.b64encode(b"me:p@ss") in asked) == bool(login)
    assert between.passed
    assert KEY.encode() not in between.passed
    assert len(served.heads) == 2


async def test_no_proxy_means_none(tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    async with proxy() as between, provider(says(WHOLE), tls) as served:
        monkeypatch.setenv("HTTPS_PROXY", between.url)
        monkeypatch.setenv("NO_PROXY", "example.org, 127.0.0.1")
        async with UpstreamClient(SystemClock()) as client:
            assert await ask(client, upstream_at(served.url)) == (200, b"ok")
    assert between.asked == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "the proxy said 407 Proxy Authentication Required"),
        (b"nonsense\r\n\r\n", "the proxy did not answer in HTTP"),
        (b"", "the proxy did not answer in HTTP"),
    ],
)
async def test_a_proxy_that_refuses_is_asked_once(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, answer: bytes, said: str
) -> None:
    async with proxy(answer) as between, provider(says(WHOLE), tls) as served:
        monkeypatch.setenv("HTTPS_PROXY", between.url)
        async with UpstreamClient(SystemClock()) as client:
            with pytest.raises(NoAnswer, match=said) as failed:
                await ask(client, upstream_at(served.url))
    assert failed.value.code == "upstream_unreachable"
    assert (len(between.asked), served.heads) == (1, [])


async def test_a_proxy_of_an_unknown_kind_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    async with UpstreamClient(SystemClock()) as client:
        with pytest.raises(NoAnswer, match="a proxy that is not http"):
            await ask(client, upstream_at("https://127.0.0.1:1"))
