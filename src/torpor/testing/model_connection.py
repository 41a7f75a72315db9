"""One client's connection to the scripted model: h11 over asyncio streams, and the ways to end it badly."""

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qs

import h11

REQUEST_BYTES_MAX = 64 << 20
HEAD_BYTES_MAX = 256 << 10


class ClientLeft(Exception):
    """The other side closed its connection before its answer was complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    @property
    def credential(self) -> str:
        named = self.headers.get("x-api-key") or self.headers.get("x-goog-api-key")
        in_query = parse_qs(self.query).get("key", [""])[0]
        return named or in_query or self.headers.get("authorization", "").removeprefix("Bearer ")


@dataclass(slots=True)
class Connection:
    """One client's connection: h11 over asyncio streams, and the ways to end it badly."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    http: h11.Connection = field(
        default_factory=lambda: h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
    )
    sent_bytes: int = 0

    async def request(self) -> Request | None:
        """The next request; None when the client is done."""
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = self.http.next_event()
            if event is h11.NEED_DATA:
                if self.http.they_are_waiting_for_100_continue:
                    await self.send(h11.InformationalResponse(status_code=100, headers=[]))
                self.http.receive_data(await self.reader.read(65536))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
                path, _, query = head.target.decode().partition("?")
                method = head.method.decode()
                return Request(method=method, path=path, query=query, headers=headers, body=bytes(body))
            else:
                return None
            if len(body) > REQUEST_BYTES_MAX:
                return None

    async def send(self, event: h11.Event) -> None:
        await self.send_raw(self.http.send(event) or b"")

    async def send_raw(self, data: bytes) -> None:
        self.writer.write(data)
        try:
            await self.writer.drain()
        except ConnectionError as error:
            raise ClientLeft from error
        self.sent_bytes += len(data)

    async def respond(self, status: int, body: bytes, **headers: str) -> None:
        fields = {"content-type": "application/json", "content-length": str(len(body))}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        await self.head(status, list(fields.items()))
        await self.send(h11.Data(data=body))
        await self.send(h11.EndOfMessage())

    async def head(self, status: int, headers: list[tuple[str, str]]) -> None:
        reason = HTTPStatus(status).phrase if status in set(HTTPStatus) else "Overloaded"
        await self.send(h11.Response(status_code=status, headers=headers, reason=reason.encode()))

    async def pause(self, seconds: float | None) -> None:
        """Wait, None = for ever, but no longer than the client stays."""
        if seconds == 0:
            return
        try:
            async with asyncio.timeout(seconds):
                self.http.receive_data(await self.reader.read(65536))
                raise ClientLeft
        except TimeoutError:
            return
        except (ConnectionError, h11.RemoteProtocolError) as error:
            raise ClientLeft from error

    def reset(self) -> None:
        """End it with RST."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
