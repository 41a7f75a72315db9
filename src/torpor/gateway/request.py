"""Reads one HTTP request from a stream, as bytes of a hostile client (h11, no I/O of its own).

What is refused here depends on the request's bytes alone, never on how they were cut into pieces or on time: a restored
agent whose refusal was half delivered gets the same bytes again.
"""

import asyncio
import zlib
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import h11
import zstandard

from torpor.core.call import CONTINUE, ResponseHead
from torpor.sandbox.streams import Stream

HEAD_BYTES_MAX = 128 << 10
BODY_BYTES_MAX = 64 << 20
DECODED_BYTES_MAX = BODY_BYTES_MAX
ZSTD_WINDOW_BYTES_MAX = 8 << 20
"""What RFC 9659 lets a client use; a frame could ask for more memory than its content has."""
SMALL_BODY_BYTES_MAX = 1 << 20
"""Bodies up to this are read at once; a sandbox has at most 256 connections."""
LARGE_BODIES_BYTES_MAX = 256 << 20
"""All larger bodies that are being read at one time, together."""

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLine:
    """A request before its body.

    Attributes:
        headers: as they were sent, in order.
        continued: the client waits for `100 Continue`, and gets it.
    """

    method: str
    target: str
    http_version: str
    headers: Headers
    continued: bool

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def header(self, name: str) -> str:
        """The values of a header, joined as HTTP says; empty if it is not there."""
        return ", ".join(value for key, value in self.headers if key.lower() == name)

    def not_continued(self) -> "RequestLine":
        """The same, answered without `100 Continue`: it is refused before its body is read."""
        return replace(self, continued=False)

    def shape(self, status: int, reason: str, headers: Headers) -> ResponseHead:
        """The head of an answer to this request."""
        return ResponseHead(
            status=status,
            reason=reason,
            headers=headers,
            continued=self.continued,
            bodiless=self.method == "HEAD" or status in {204, 304},
            chunked=self.http_version == "1.1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A whole request; it took `length` bytes of its stream."""

    line: RequestLine
    body: bytes
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """Bytes that are no request that this gateway takes. `line` is there if that much was understood."""

    status: int
    code: str
    reason: str
    line: RequestLine | None = None


async def read_line(stream: Stream, reader: "RequestReader") -> RequestLine | Unreadable | None:
    """Read up to the end of the headers; None if the client said nothing at all.

    Raises:
        StreamGone: the client left.
    """
    while True:
        event = reader.next()
        if event is None:
            reader.feed(await stream.receive())
        elif isinstance(event, h11.ConnectionClosed):
            return None
        elif isinstance(event, (RequestLine, Unreadable)):
            return event


class Room:
    """Memory for the large bodies that are read at one time. Who waits for it leaves its bytes in the sandbox.

    A body's whole length is reserved before it is read, so that those which were begun can be finished.
    """

    def __init__(self, size: int = LARGE_BODIES_BYTES_MAX) -> None:
        self._free = size
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def reserve(self, size: int) -> AsyncGenerator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            self._free += size
            async with self._changed:
                self._changed.notify_all()


async def read_body(
    stream: Stream, reader: "RequestReader", room: Room, reserved: AsyncExitStack
) -> Request | Unreadable:
    """Read the rest, after `100 Continue` if the client waits for it; what it takes of `room` goes with `reserved`.

    Raises:
        StreamGone: the client left.
    """
    if reader.line is not None and reader.line.continued:
        await stream.send(0, CONTINUE)
    large = False
    while True:
        event = reader.next()
        if isinstance(event, (Request, Unreadable)):
            return event
        if reader.body_bytes > SMALL_BODY_BYTES_MAX and not large:
            large = True
            await reserved.enter_async_context(room.reserve(reader.body_bytes_max))
        if event is None:
            reader.feed(await stream.receive())


class RequestReader:
    """One request out of pieces of bytes."""

    def __init__(self) -> None:
        # Twice the limit: a head that is too long is refused with the same words whether it came at once or not.
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=2 * HEAD_BYTES_MAX)
        self._fed_bytes = 0
        self._body = bytearray()
        self.line: RequestLine | None = None

    @property
    def body_bytes(self) -> int:
        """How much of the body is here."""
        return len(self._body)

    @property
    def body_bytes_max(self) -> int:
        """How long the body may become."""
        announced = self.line.header("content-length") if self.line is not None else ""
        return int(announced) if announced.isdigit() else BODY_BYTES_MAX

    def feed(self, data: bytes) -> None:
        self._fed_bytes += len(data)
        self._http.receive_data(data)

    def next(self) -> RequestLine | Request | Unreadable | h11.ConnectionClosed | None:
        """The next part, None if more bytes are needed."""
        try:
            event = self._http.next_event()
            while isinstance(event, h11.Data):
                self._body += event.data
                if len(self._body) > BODY_BYTES_MAX:
                    return self._too_large(self.line)
                event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            return self._unreadable(error.error_status_hint)
        if event is h11.NEED_DATA:
            return None
        if isinstance(event, h11.Request):
            self.line = _line_of(event)
            return self._checked(self.line)
        if isinstance(event, h11.EndOfMessage) and self.line is not None:
            length = self._fed_bytes - len(self._http.trailing_data[0])
            return Request(line=self.line, body=bytes(self._body), length=length)
        return event if isinstance(event, h11.ConnectionClosed) else self._unreadable(400)

    def _checked(self, line: RequestLine) -> RequestLine | Unreadable:
        size = sum(len(name) + len(value) + 4 for name, value in line.headers) + len(line.target)
        if size > HEAD_BYTES_MAX:
            return self._unreadable(431)
        announced = line.header("content-length")
        if announced and line.header("transfer-encoding"):
            # Two lengths are how requests are smuggled past a proxy. Nobody honest sends them.
            reason = "it says two lengths of its body"
            return Unreadable(status=400, code="request_malformed", reason=reason, line=line.not_continued())
        if announced.isdigit() and int(announced) > BODY_BYTES_MAX:
            return self._too_large(line.not_continued())
        return line

    def _too_large(self, line: RequestLine | None) -> Unreadable:
        reason = f"its body is longer than {BODY_BYTES_MAX >> 20} MiB"
        return Unreadable(status=413, code="request_too_large", reason=reason, line=line)

    def _unreadable(self, status: int) -> Unreadable:
        if status == 431:
            reason = f"its headers are longer than {HEAD_BYTES_MAX >> 10} KiB"
            return Unreadable(status=431, code="request_head_too_large", reason=reason)
        return Unreadable(status=400, code="request_malformed", reason="it is not HTTP/1.1", line=self.line)


def _line_of(event: h11.Request) -> RequestLine:
    version = event.http_version.decode()
    headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers.raw_items())
    return RequestLine(
        method=event.method.decode(),
        target=event.target.decode("latin-1"),
        http_version=version,
        headers=headers,
        continued=expects_continue(version, headers),
    )


def expects_continue(http_version: str, headers: Headers) -> bool:
    """Whether a client waits for `100 Continue` before it sends its body."""
    expected = {value.strip().lower() for name, value in headers if name.lower() == "expect"}
    return http_version == "1.1" and "100-continue" in expected


def decoded_body(line: RequestLine, body: bytes) -> bytes:
    """The body without content-encoding, for matching; as it is if it can't be decoded within bounds."""
    try:
        match line.header("content-encoding").strip().lower():
            case "gzip" | "x-gzip" | "deflate":
                inflate = zlib.decompressobj(wbits=47)
                plain = inflate.decompress(body, DECODED_BYTES_MAX)
                return body if inflate.unconsumed_tail else plain
            case "zstd":
                with zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX).stream_reader(body) as reader:
                    plain = reader.read(DECODED_BYTES_MAX + 1)
                return body if len(plain) > DECODED_BYTES_MAX else plain
            case _:
                return body
    except (zlib.error, zstandard.ZstdError):
        return body
