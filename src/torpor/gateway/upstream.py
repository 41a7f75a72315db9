"""Sends a call to its provider and hands back the raw bytes of the answer: HTTP/1.1, no redirects, no decoding.

The agent's own authorization never passes; the provider's key is added here. `send` sends a request once: only a
connection that was never made is tried again, since no byte of the request was in it.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import unquote_plus

import httpx

from torpor.config import Family, Secret, Upstream
from torpor.core.clock import Clock
from torpor.core.errors import UpstreamFailed
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
_OURS = frozenset({"host", "content-length", "accept-encoding", "expect"})
CONNECT_RETRY_SECONDS = (0.25, 1.0)
"""Pauses before a connection is tried again."""


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
    raw: AsyncIterator[bytes]
    _opened: list[bytes] = field(default_factory=list[bytes])

    async def opening(self, bytes_max: int) -> bytes:
        """Some bytes of the body's beginning, which `pieces` gives all the same.

        Raises:
            NoAnswer: it broke off.
        """
        try:
            while sum(map(len, self._opened)) < bytes_max and (data := await anext(self.raw, None)) is not None:
                self._opened.append(data)
        except httpx.HTTPError as error:
            raise _translated(error) from error
        return b"".join(self._opened)

    async def pieces(self) -> AsyncGenerator[bytes]:
        """The body as it arrives.

        Raises:
            NoAnswer: it broke off.
        """
        try:
            for data in self._opened:
                yield data
            async for data in self.raw:
                yield data
        except httpx.HTTPError as error:
            raise _translated(error) from error


class UpstreamClient:
    """Connections to the configured providers; an asynchronous context manager."""

    def __init__(self, clock: Clock) -> None:
        self._keys = KeyRing(clock)
        self._never_ask: set[str] = set()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=16, keepalive_expiry=5.0)
        # A proxy of the environment may tunnel to https, which it cannot read; what goes in the clear goes straight.
        straight = {"http://": httpx.AsyncHTTPTransport(limits=limits)}
        self._http = httpx.AsyncClient(follow_redirects=False, limits=limits, timeout=600, mounts=straight)

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, traceback)

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

    @asynccontextmanager
    async def send(self, outgoing: Outgoing, upstream: Upstream) -> AsyncGenerator[UpstreamAnswer]:
        """Send a request and wait for the head of its answer.

        Raises:
            NoAnswer: no head came.
        """
        request = _request(outgoing, upstream, await self.key_for(upstream))
        response = await self._send(request)
        try:
            yield UpstreamAnswer(
                status=response.status_code,
                reason=_reason(response),
                headers=_answer_headers(response, bodiless=outgoing.method == "HEAD"),
                raw=response.aiter_raw(),
            )
        finally:
            await response.aclose()

    async def _send(self, request: httpx.Request) -> httpx.Response:
        pauses = iter(CONNECT_RETRY_SECONDS)
        while True:
            try:
                return await self._http.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                pause = next(pauses, None)
                if pause is None:
                    raise _translated(error) from error
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise _translated(error) from error
            await asyncio.sleep(pause)


_KEY_HEADERS: Mapping[Family, bytes] = {
    "openai": b"x-api-key",
    "anthropic": b"x-api-key",
    "gemini": b"x-goog-api-key",
}


def _request(outgoing: Outgoing, upstream: Upstream, key: Secret | None) -> httpx.Request:
    address = upstream_address(upstream, outgoing.destination.route.path)
    url = httpx.URL(upstream.base_url)
    query = f"?{outgoing.query}".encode("latin-1") if outgoing.query else b""
    headers = [
        (name.encode("latin-1"), value.encode("latin-1"))
        for name, value in _without(outgoing.headers, _HOP_BY_HOP | _OURS | CREDENTIAL_HEADERS)
    ]
    headers.append((b"accept-encoding", b"identity"))
    if key is not None:
        secret = key.reveal().encode()
        bearer = (b"authorization", b"Bearer " + secret)
        headers.append(bearer if upstream.bearer else (_KEY_HEADERS[upstream.family], secret))
    timeout = httpx.Timeout(upstream.read_seconds, connect=upstream.connect_seconds, pool=None)
    return httpx.Request(
        outgoing.method,
        url.copy_with(raw_path=address.encode("latin-1") + query),
        headers=headers,
        content=outgoing.body or None,
        extensions={"timeout": timeout.as_dict()},
    )


def upstream_address(upstream: Upstream, path: str) -> str:
    """A path of the provider's documentation as it is below an upstream's address, which may hold the /v1 already."""
    base = httpx.URL(upstream.base_url).raw_path.decode("latin-1").rstrip("/")
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


def _answer_headers(response: httpx.Response, *, bodiless: bool) -> Headers:
    headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in response.headers.raw)
    return _without(headers, _HOP_BY_HOP if bodiless else _HOP_BY_HOP | {"content-length"})


def _reason(response: httpx.Response) -> str:
    """The phrase as it came, or the usual one: there are clients that trip over a status line without any."""
    said: bytes = response.extensions.get("reason_phrase", b"")
    return said.decode("latin-1") or response.reason_phrase


def _translated(error: httpx.HTTPError | httpx.InvalidURL) -> NoAnswer:
    """An httpx error in our words. Its text is left out where it could hold a header's value."""
    match error:
        case httpx.ConnectError() | httpx.ConnectTimeout() | httpx.ProxyError():
            reason = f"it could not be reached ({error or type(error).__name__})"
            return NoAnswer("upstream_unreachable", reason, status=502, retry=True)
        case httpx.TimeoutException():
            reason = "it took the request and fell silent"
            return NoAnswer("upstream_silent", reason, status=504, retry=True)
        case httpx.NetworkError():
            return NoAnswer("upstream_broke_off", "the connection broke off", status=502, retry=True)
        case httpx.RemoteProtocolError():
            reason = "the connection ended early, or what came was not HTTP"
            return NoAnswer("upstream_broke_off", reason, status=502, retry=True)
        case _:
            reason = f"the request could not be sent ({type(error).__name__})"
            return NoAnswer("upstream_misused", reason, status=502, retry=False)
