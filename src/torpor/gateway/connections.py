"""Makes connections to providers, lends them, and keeps idle ones for a while.

A connection is made straight, or, for https, through the environment's proxy, which sees only where it goes. Making one
sends nothing of any request, so it may begin before a request may leave.
"""

import asyncio
import base64
import ssl
from collections import deque
from dataclasses import dataclass
from ipaddress import ip_address
from types import TracebackType
from typing import Self
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from torpor.gateway.connection import HEAD_BYTES_MAX, Connection
from torpor.sandbox.fifos import Pulse

IDLE_MAX = 16
"""Idle connections that are kept, of all origins."""
IDLE_SECONDS = 5.0
HAPPY_EYEBALLS_SECONDS = 0.25
_PORTS = {"http": 80, "https": 443}


class Unreachable(Exception):
    """No connection could be made. `again`: another try may make it."""

    def __init__(self, reason: str, *, again: bool) -> None:
        super().__init__(reason)
        self.again = again


@dataclass(frozen=True, slots=True)
class Origin:
    """Where connections go; calls of the same origin may share them."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, parts: SplitResult) -> "Origin":
        """Of an address that has a host."""
        host = parts.hostname or ""
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
        return cls(parts.scheme, host, parts.port or _PORTS[parts.scheme])

    @property
    def netloc(self) -> str:
        """As the `host` header says it."""
        return _bracketed(self.host) if self.port == _PORTS[self.scheme] else self.authority

    @property
    def authority(self) -> str:
        return f"{_bracketed(self.host)}:{self.port}"


class Connections:
    """All connections of one client; an asynchronous context manager."""

    def __init__(self) -> None:
        self._idle: deque[tuple[Origin, Connection, asyncio.TimerHandle]] = deque()
        self._tls: ssl.SSLContext | None = None
        self._group = asyncio.TaskGroup()
        self._making: set[asyncio.Task[Connection | Unreachable]] = set()
        self._open: set[Connection] = set()
        self._lost = Pulse()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._making:
            task.cancel()
        await self._group.__aexit__(kind, error, traceback)
        for _, _, expiry in self._idle:
            expiry.cancel()
        self._idle.clear()
        for connection in tuple(self._open):
            connection.close()
        while self._open:
            await self._lost.wait()

    def lease(self, origin: Origin, connect_seconds: float) -> "Lease":
        """An idle connection, or one that begins to be made now."""
        at_hand = self._take(origin)
        return Lease(self, origin, connect_seconds, at_hand)

    def make(self, origin: Origin, connect_seconds: float) -> "asyncio.Task[Connection | Unreachable]":
        task = self._group.create_task(self._make(origin, connect_seconds))
        self._making.add(task)
        task.add_done_callback(self._making.discard)
        return task

    def keep(self, origin: Origin, connection: Connection) -> None:
        """Take a connection that nobody uses; it is closed unless it is good for another exchange and there is room."""
        if not connection.reusable or len(self._idle) >= IDLE_MAX:
            connection.close()
            return
        expiry = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._expire, connection)
        self._idle.append((origin, connection, expiry))

    def _take(self, origin: Origin) -> Connection | None:
        """The one that was used last: it is the least likely to be closed soon."""
        for known in reversed(self._idle):
            if known[0] == origin:
                self._idle.remove(known)
                known[2].cancel()
                if known[1].is_fresh():
                    return known[1]
                known[1].close()
                return self._take(origin)
        return None

    def _expire(self, connection: Connection) -> None:
        for known in self._idle:
            if known[1] is connection:
                self._idle.remove(known)
                connection.close()
                return

    async def _make(self, origin: Origin, connect_seconds: float) -> Connection | Unreachable:
        try:
            async with asyncio.timeout(connect_seconds):
                proxy = _proxy_for(origin)
                return await (self._straight(origin) if proxy is None else self._through(proxy, origin))
        except TimeoutError:
            return Unreachable(f"it did not answer within {connect_seconds:g} s", again=True)
        except (OSError, UnicodeError) as error:  # TLS errors are among the first, names that are none the second
            return Unreachable(str(error) or type(error).__name__, again=True)
        except Unreachable as refused:
            return refused

    def _connection(self) -> Connection:
        return Connection(self._open, self._lost)

    async def _straight(self, origin: Origin) -> Connection:
        loop = asyncio.get_running_loop()
        secure = origin.scheme == "https"
        _, connection = await loop.create_connection(
            self._connection,
            origin.host,
            origin.port,
            ssl=self._context() if secure else None,
            server_hostname=origin.host if secure else None,
            # A race of one is not only useless: cancelled at its end, it forgets to close its socket.
            happy_eyeballs_delay=None if _is_address(origin.host) else HAPPY_EYEBALLS_SECONDS,
        )
        return connection

    async def _through(self, proxy: SplitResult, origin: Origin) -> Connection:
        """A tunnel, with TLS from end to end in it."""
        loop = asyncio.get_running_loop()
        transport, tunnel = await loop.create_connection(
            _Tunnel,
            proxy.hostname or "",
            proxy.port or _PORTS[proxy.scheme],
            ssl=self._context() if proxy.scheme == "https" else None,
        )
        try:
            transport.write(_connect_request(proxy, origin))
            _check_tunnel(await tunnel.head)
            connection = self._connection()
            secured = await loop.start_tls(transport, connection, self._context(), server_hostname=origin.host)
        except BaseException:
            transport.abort()
            raise
        if secured is None:
            raise Unreachable("the tunnel of the proxy ended", again=True)
        connection.connection_made(secured)
        return connection

    def _context(self) -> ssl.SSLContext:
        """Trusts what httpx trusts: certifi's authorities, or those that SSL_CERT_FILE or SSL_CERT_DIR names."""
        if self._tls is None:
            import httpx

            self._tls = httpx.create_ssl_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls


class _Tunnel(asyncio.Protocol):
    """Reads the head of a proxy's answer to CONNECT; what comes after it is not ours to read."""

    def __init__(self) -> None:
        self.head: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._said = b""

    def data_received(self, data: bytes) -> None:
        self._said += data
        if b"\r\n\r\n" in self._said and not self.head.done():
            self.head.set_result(self._said)
        elif len(self._said) > HEAD_BYTES_MAX:
            self._fail()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._fail()

    def _fail(self) -> None:
        if not self.head.done():
            self.head.set_exception(Unreachable("the proxy did not answer in HTTP", again=False))


class Lease:
    """A connection for one exchange: it is at hand, or is being made. End it with `end`."""

    def __init__(
        self, connections: Connections, origin: Origin, connect_seconds: float, at_hand: Connection | None
    ) -> None:
        self._connections = connections
        self._origin = origin
        self._connect_seconds = connect_seconds
        self._connection = at_hand
        self._was_idle = at_hand is not None
        self._making = connections.make(origin, connect_seconds) if at_hand is None else None

    async def connection(self) -> Connection:
        """The connection, once it is made. One that was idle and has gone stale meanwhile is replaced.

        Raises:
            Unreachable: none could be made.
        """
        if self._connection is not None and self._was_idle and not self._connection.is_fresh():
            self._connection.close()
            self._connection = None
        if self._connection is None:
            making = self._making or self._connections.make(self._origin, self._connect_seconds)
            self._making = making
            made = await asyncio.shield(making)
            self._making, self._was_idle = None, False
            if isinstance(made, Unreachable):
                raise made
            self._connection = made
        return self._connection

    def end(self) -> None:
        """Leave the connection to the next exchange, if it is good for one."""
        making, self._making = self._making, None
        if making is not None:
            making.add_done_callback(self._keep_made)
        connection, self._connection = self._connection, None
        if connection is not None:
            self._connections.keep(self._origin, connection)

    def _keep_made(self, making: "asyncio.Task[Connection | Unreachable]") -> None:
        if not making.cancelled() and isinstance(made := making.result(), Connection):
            self._connections.keep(self._origin, made)


def _proxy_for(origin: Origin) -> SplitResult | None:
    """What the environment names for an origin: nothing for http, whose keys a proxy would read."""
    if origin.scheme != "https":
        return None
    proxies = getproxies()
    named = proxies.get("https") or proxies.get("all")
    if not named or proxy_bypass(origin.host):
        return None
    proxy = urlsplit(named if "://" in named else f"http://{named}")
    if proxy.scheme not in _PORTS or not proxy.hostname:
        raise Unreachable("the environment names a proxy that is not http:// or https:// and a host", again=False)
    return proxy


def _connect_request(proxy: SplitResult, origin: Origin) -> bytes:
    lines = [f"CONNECT {origin.authority} HTTP/1.1", f"host: {origin.authority}"]
    if proxy.username is not None:
        login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        lines.append(f"proxy-authorization: Basic {base64.b64encode(login.encode()).decode()}")
    return "\r\n".join([*lines, "", ""]).encode()


def _check_tunnel(head: bytes) -> None:
    """The proxy's answer to CONNECT."""
    status_line = head.partition(b"\r\n")[0].split(b" ", 2)
    if len(status_line) < 2 or not status_line[0].startswith(b"HTTP/1."):
        raise Unreachable("the proxy did not answer in HTTP", again=False)
    if not status_line[1].startswith(b"2") or len(status_line[1]) != 3:
        said = b" ".join(status_line[1:]).decode("ascii", "replace")[:100]
        raise Unreachable(f"the proxy said {said}", again=False)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
