"""The way to a provider: TLS with whom the authorities vouch for, and the proxies of the environment."""

import asyncio
import base64
import datetime as dt
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.unit.gateway.providers import (
    KEY,
    WHOLE,
    ask,
    listening,
    provider,
    refused,
    says,
    upstream_at,
)

from torpor.core.clock import SystemClock
from torpor.gateway import upstream
from torpor.gateway.failure import NoAnswer
from torpor.gateway.upstream import UpstreamClient


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
