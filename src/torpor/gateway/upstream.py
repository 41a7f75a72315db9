"""Sends a call to its provider and hands back the raw bytes of the answer: HTTP/1.1, no redirects, no decoding.

The agent's own authorization never passes; the provider's key is added here. `send` sends a request once: only a
connection that was never made is tried again, since no byte of the request was in it.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Self
from urllib.parse import quote, unquote_plus, urlsplit

from torpor.config import Family, Secret, Upstream
from torpor.core.clock import Clock
from torpor.core.errors import UpstreamFailed
from torpor.gateway.connection import Broken, Connection, Failure, RawHeaders
from torpor.gateway.connections import Connections, Lease, Origin, Unreachable
from torpor.gateway.failure import NoAnswer
from torpor.gateway.keys import KeyRing
from torpor.gateway.request import Headers
from torpor.gateway.routing import Destination

CREDENTIAL_HEADERS = frozenset({"authorization", "proxy-authorization", "x-api-key", "api-key", "x-goog-api-key"})
CREDENTIAL_PARAMETER = "key"
"""Whatever an agent sends in them is dropped, and stands in no log."""

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "http2-settings",
    }
)
_WITH_LENGTH = frozenset({"POST", "PUT", "PATCH"})
"""Methods whose requests say that they have no body."""
_OURS = frozenset({"host", "content-length", "accept-encoding", "expect"})
CONNECT_RETRY_SECONDS = (0.25, 1.0)
"""Pauses before a connection is tried again."""
DISCARD_SECONDS = 0.5
DISCARD_BYTES_MAX = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A request as it is sent; `headers` and `query` are the agent's, free of credentials."""

    destination: Destination
    model: str | None
    method: str
    query: str
    headers: Headers
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamAnswer:
    """A response whose head has arrived; `headers` without what concerns the connection."""

    status: int
    reason: str
    headers: Headers
    connection: Connection
    _opened: list[bytes] = field(default_factory=list[bytes])

    async def opening(self, bytes_max: int) -> bytes:
        """Some bytes of the body's beginning, which `next` gives all the same.

        Raises:
            NoAnswer: it broke off.
        """
        opened: list[bytes] = []
        while sum(map(len, opened)) < bytes_max and (data := await self.next()):
            opened.append(data)
        self._opened.extend(opened)
        return b"".join(opened)

    async def next(self) -> bytes:
        """What arrived of the body since the last time, waiting for something; empty at the end.

        Raises:
            NoAnswer: it broke off, and all that came of it was fetched.
        """
        try:
            return self._opened.pop(0) if self._opened else await self.connection.next()
        except Broken as error:
            raise _translated(error) from error

    async def discard(self) -> None:
        """Read a refusal to its end, if that comes soon, so that its connection can carry the next try."""
        with suppress(TimeoutError, NoAnswer):
            async with asyncio.timeout(DISCARD_SECONDS):
                size = 0
                while size < DISCARD_BYTES_MAX and (data := await self.next()):
                    size += len(data)


class UpstreamClient:
    """Connections to the configured providers; an asynchronous context manager."""

    def __init__(self, clock: Clock) -> None:
        self._keys = KeyRing(clock)
        self._connections = Connections()
        self._never_ask: set[str] = set()

    async def __aenter__(self) -> Self:
        await self._connections.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._connections.__aexit__(kind, error, traceback)

    def counts_when_asked(self, upstream: Upstream) -> bool:
        """Whether an upstream may be asked for token counts."""
        return upstream.stream_usage and upstream.name not in self._never_ask

    def never_ask_again(self, upstream: Upstream) -> None:
        """It refused to be asked; that lasts as long as this process."""
        self._never_ask.add(upstream.name)

    async def key_for(self, upstream: Upstream) -> Secret | None:
        """The key that a request is sent with, which its answer must be cleared of.

        Raises:
            NoAnswer: the key can't be read.
        """
        try:
            return await self._keys.key(upstream)
        except UpstreamFailed as error:
            raise NoAnswer(error.code, str(error), status=401, retry=False) from error

    def reach(self, upstream: Upstream) -> Lease:
        """Begin to connect, if there is no idle connection: a request will follow, or `end` the lease."""
        return self._connections.lease(Origin.of(urlsplit(upstream.base_url)), upstream.connect_seconds)

    @asynccontextmanager
    async def send(
        self, outgoing: Outgoing, upstream: Upstream, *, reached: Lease | None = None
    ) -> AsyncGenerator[UpstreamAnswer]:
        """Send a request and wait for the head of its answer.

        Args:
            reached: what `reach` gave, which ends here.

        Raises:
            NoAnswer: no head came.
        """
        lease = reached or self.reach(upstream)
        try:
            key = await self.key_for(upstream)
            connection = await self._connected(lease)
            try:
                answer = await _exchange(connection, outgoing, upstream, key)
                yield answer
            finally:
                connection.end()
        except Broken as error:
            raise _translated(error) from error
        finally:
            lease.end()

    async def _connected(self, lease: Lease) -> Connection:
        pauses = iter(CONNECT_RETRY_SECONDS)
        while True:
            try:
                return await lease.connection()
            except Unreachable as error:
                pause = next(pauses, None)
                if pause is None or not error.again:
                    reason = f"it could not be reached ({error})"
                    raise NoAnswer("upstream_unreachable", reason, status=502, retry=True) from error
            await asyncio.sleep(pause)


async def _exchange(
    connection: Connection, outgoing: Outgoing, upstream: Upstream, key: Secret | None
) -> UpstreamAnswer:
    connection.begin(
        method=outgoing.method,
        target=_target(outgoing, upstream),
        headers=_sent_headers(outgoing, upstream, key),
        body=outgoing.body,
    )
    connection.send(silence_seconds=upstream.read_seconds)
    head = await connection.head()
    return UpstreamAnswer(
        status=head.status_code,
        reason=_reason(head.status_code, bytes(head.reason)),
        headers=_answer_headers(head.headers.raw_items(), bodiless=outgoing.method == "HEAD"),
        connection=connection,
    )


_KEY_HEADERS: Mapping[Family, bytes] = {
    "openai": b"x-api-key",
    "anthropic": b"x-api-key",
    "gemini": b"x-goog-api-key",
}


def _target(outgoing: Outgoing, upstream: Upstream) -> bytes:
    query = f"?{outgoing.query}" if outgoing.query else ""
    return (upstream_address(upstream, outgoing.destination.route.path) + query).encode("latin-1")


def _sent_headers(outgoing: Outgoing, upstream: Upstream, key: Secret | None) -> RawHeaders:
    headers = [(b"host", Origin.of(urlsplit(upstream.base_url)).netloc.encode("latin-1"))]
    headers += [
        (name.encode("latin-1"), value.encode("latin-1"))
        for name, value in _without(outgoing.headers, _HOP_BY_HOP | _OURS | CREDENTIAL_HEADERS)
    ]
    headers.append((b"accept-encoding", b"identity"))
    if key is not None:
        secret = key.reveal().encode()
        bearer = (b"authorization", b"Bearer " + secret)
        headers.append(bearer if upstream.bearer else (_KEY_HEADERS[upstream.family], secret))
    if outgoing.body or outgoing.method in _WITH_LENGTH:
        headers.append((b"content-length", b"%d" % len(outgoing.body)))
    return headers


def upstream_address(upstream: Upstream, path: str) -> str:
    """A path of the provider's documentation as it is below an upstream's address, which may hold the /v1 already."""
    base = quote(urlsplit(upstream.base_url).path, safe="/%:@!$&'()*+,;=~").rstrip("/")
    if upstream.family != "openai":
        return base + path
    return base + path.removeprefix("/v1") if path.startswith("/v1/") else base.removesuffix("/v1") + path


def without_credentials(headers: Headers) -> Headers:
    return _without(headers, CREDENTIAL_HEADERS)


def target_without_key(target: str) -> str:
    """A request's target without `key` in its query, where Google's clients may put it."""
    path, mark, query = target.partition("?")
    kept = [field for field in query.split("&") if unquote_plus(field.partition("=")[0]) != CREDENTIAL_PARAMETER]
    return path + (mark if kept and query else "") + "&".join(kept)


def _without(headers: Headers, dropped: frozenset[str]) -> Headers:
    """The headers but some, and but those that `connection` names."""
    named = {
        token.strip().lower() for name, value in headers if name.lower() == "connection" for token in value.split(",")
    }
    return tuple((name, value) for name, value in headers if name.lower() not in dropped | named)


def _answer_headers(headers: RawHeaders, *, bodiless: bool) -> Headers:
    said = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in headers)
    return _without(said, _HOP_BY_HOP if bodiless else _HOP_BY_HOP | {"content-length"})


def _reason(status: int, said: bytes) -> str:
    """The phrase as it came, or the usual one: there are clients that trip over a status line without any."""
    if said:
        return said.decode("latin-1")
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _translated(error: Broken) -> NoAnswer:
    match error.failure:
        case Failure.SILENT:
            reason = "it took the request and fell silent"
            return NoAnswer("upstream_silent", reason, status=504, retry=True)
        case Failure.LOST:
            return NoAnswer("upstream_broke_off", "the connection broke off", status=502, retry=True)
        case Failure.NOT_HTTP:
            reason = "the connection ended early, or what came was not HTTP"
            return NoAnswer("upstream_broke_off", reason, status=502, retry=True)
        case Failure.UNSENDABLE:
            return NoAnswer("upstream_misused", "the request could not be sent", status=502, retry=False)
