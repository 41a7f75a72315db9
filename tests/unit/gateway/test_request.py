"""A request is read, or refused, by its bytes alone: however they are cut into pieces."""

import asyncio
import gzip
import itertools
from contextlib import AsyncExitStack

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from torpor.config import GATEWAY_PORT, PROXY_PORT
from torpor.core.call import response_bytes
from torpor.gateway.admission import LocalAnswer, admit
from torpor.gateway.dialects.base import Shape
from torpor.gateway.intake import Intake, from_log, take_in
from torpor.gateway.request import HEAD_BYTES_MAX, RequestLine, Room, decoded_body
from torpor.gateway.routing import Destination, Routing
from torpor.sandbox.streams import StreamGone

BODY = b'{"model": "m", "stream": true, "messages": [{"role": "user", "content": "hi"}]}'
CHUNKED = b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in (BODY[:9], BODY[9:], b""))


def post(*headers: str, path: str = "/v1/messages", version: str = "1.1", body: bytes = BODY) -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: x", "Content-Type: application/json", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


NOWHERE = Routing(())
LENGTH = f"Content-Length: {len(BODY)}"
REQUESTS = {
    "plain": post(LENGTH, "Authorization: Bearer fake"),
    "chunked": post("Transfer-Encoding: chunked", body=CHUNKED),
    "continued": post(LENGTH, "Expect: 100-continue"),
    "http/1.0": post(LENGTH, version="1.0"),
    "two requests": post(LENGTH) * 2,
    "unknown path": post(LENGTH, path="/v1/files"),
    "continued unknown path": post(LENGTH, "Expect: 100-continue", path="/v1/files"),
    "preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "not http": b"\x16\x03\x01\x00 \r\n\r\n and more",
    "half a body": post(LENGTH)[:-5],
    "bad chunk": post("Transfer-Encoding: chunked", body=b"zz\r\nabc"),
    "large head": post(LENGTH, f"X: {'y' * HEAD_BYTES_MAX}"),
    "endless head": b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * (2 * HEAD_BYTES_MAX + 100),
    "large body": post("Content-Length: 99999999999"),
    "continued large body": post("Content-Length: 99999999999", "Expect: 100-continue"),
}


class PiecewiseStream:
    """What `take_in` needs of a stream, with the request in given pieces and then the client's end."""

    def __init__(self, pieces: list[bytes], port: int = GATEWAY_PORT) -> None:
        self.id = 16
        self.port = port
        self.sent = 0
        self.continued = b""
        self._pieces = pieces

    async def receive(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    async def send(self, offset: int, data: bytes) -> None:
        assert offset == 0
        self.continued += data


def read(stream: PiecewiseStream) -> Intake | LocalAnswer | None:
    async def work() -> Intake | LocalAnswer | None:
        async with AsyncExitStack() as reserved:
            return await take_in(stream, NOWHERE, Room(), reserved)  # pyright: ignore[reportArgumentType]

    return asyncio.run(work())


def outcome(request: bytes, cuts: list[int]) -> object:
    """Everything that follows from a request: what the socket gets, or the call."""
    points = sorted({cut % (len(request) + 1) for cut in cuts} | {0, len(request)})
    pieces = [request[start:end] for start, end in itertools.pairwise(points) if end > start]
    stream = PiecewiseStream(pieces)
    taken_in = read(stream)
    if isinstance(taken_in, LocalAnswer):
        assert stream.continued == (b"HTTP/1.1 100 Continue\r\n\r\n" if taken_in.head.continued else b"")
        return response_bytes(taken_in.head, [taken_in.body], finished=True)
    if isinstance(taken_in, Intake):
        return (stream.continued, taken_in.key, taken_in.head, taken_in.request.body, taken_in.request.length)
    return taken_in


@pytest.mark.parametrize("name", REQUESTS)
def test_a_refusal_says_100_continue_only_if_it_was_said(name: str) -> None:
    outcome(REQUESTS[name], [])


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(REQUESTS)), cuts=st.lists(st.integers(0, 400_000), max_size=6))
def test_what_becomes_of_a_request_does_not_depend_on_its_pieces(name: str, cuts: list[int]) -> None:
    request = REQUESTS[name]
    assert outcome(request, cuts) == outcome(request, [])


def test_a_request_ends_where_its_body_ends() -> None:
    stream = PiecewiseStream([REQUESTS["two requests"]])
    intake = read(stream)
    assert isinstance(intake, Intake)
    assert intake.request.length == len(REQUESTS["plain"]) - len("Authorization: Bearer fake\r\n")
    assert (intake.model, intake.shape) == ("m", Shape.EVENTS)


def test_a_logged_request_makes_the_same_call_again() -> None:
    for name in ("plain", "chunked", "continued", "http/1.0"):
        intake = read(PiecewiseStream([REQUESTS[name]]))
        assert isinstance(intake, Intake)
        again = from_log(intake.head, intake.request.body, NOWHERE, dialect="anthropic", is_llm=True)
        assert again.key == intake.key
        assert again.head == intake.head
        assert again.request.line.shape(200, "OK", ()) == intake.request.line.shape(200, "OK", ())
        assert "authorization" not in {field.lower() for field, _ in intake.head.headers}


def test_a_logged_request_stays_in_its_dialect_though_its_key_is_not_in_the_log() -> None:
    """The header with the key tells whose models are listed, and so does nothing else of this request."""
    asked = b"GET /v1/models?key=fake HTTP/1.1\r\nHost: x\r\nx-goog-api-key: fake\r\n\r\n"
    intake = read(PiecewiseStream([asked]))
    assert isinstance(intake, Intake)
    assert "fake" not in f"{intake.head}"
    again = from_log(intake.head, b"", NOWHERE, dialect=intake.destination.dialect.name, is_llm=False)
    assert again.destination.dialect.name == "gemini"
    assert again.key == intake.key


def test_a_client_that_leaves_in_the_middle_is_gone() -> None:
    class Leaving(PiecewiseStream):
        async def receive(self) -> bytes:
            if not self._pieces:
                raise StreamGone(16, "it left")
            return await super().receive()

    with pytest.raises(StreamGone):
        read(Leaving([REQUESTS["plain"][:30]]))


def line(method: str, target: str, port: int = GATEWAY_PORT, **headers: str) -> Destination | LocalAnswer:
    fields = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    request = RequestLine(method=method, target=target, http_version="1.1", headers=fields, continued=False)
    return admit(request, port, NOWHERE)


@pytest.mark.parametrize(
    ("method", "target", "path", "is_llm"),
    [
        ("POST", "/v1/chat/completions", "/v1/chat/completions", True),
        ("GET", "/v1/models", "/v1/models", False),
        ("GET", "/v1/models/meta-llama/Llama-3:8b", "/v1/models/meta-llama/Llama-3:8b", False),
        ("POST", "/v1/messages?beta=true", "/v1/messages", True),
        ("POST", "/v1/messages/count_tokens", "/v1/messages/count_tokens", False),
    ],
)
def test_what_agents_may_ask_of_a_provider(method: str, target: str, path: str, *, is_llm: bool) -> None:
    admitted = line(method, target)
    assert isinstance(admitted, Destination)
    assert (admitted.route.path, admitted.route.is_llm) == (path, is_llm)


def test_the_models_of_anthropic_are_asked_with_its_header() -> None:
    admitted = line("GET", "/v1/models", anthropic_version="2023-06-01")
    assert isinstance(admitted, Destination)
    assert admitted.dialect.name == "anthropic"


@pytest.mark.parametrize(
    "target",
    ["/v1/models/..", "/v1/models/./x", "/v1/models/x/..", "/v1/models/a%2fb", "/v1/models/a/b/c", "/v1/files", "/v1"],
)
def test_nothing_else_is_asked(target: str) -> None:
    assert isinstance(line("GET", target), LocalAnswer)


def test_the_proxys_port_admits_nothing() -> None:
    assert isinstance(line("POST", "/v1/messages", PROXY_PORT), LocalAnswer)


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", gzip.compress(BODY, mtime=0)),
        ("zstd", zstandard.compress(BODY)),
        ("", BODY),
        ("br", BODY),
        ("gzip", BODY),
    ],
)
def test_matching_looks_through_content_encoding_as_far_as_it_can(encoding: str, packed: bytes) -> None:
    request = RequestLine(
        method="POST",
        target="/",
        http_version="1.1",
        headers=(("content-encoding", encoding),),
        continued=False,
    )
    assert decoded_body(request, packed) == BODY


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torpor.gateway.request.DECODED_BYTES_MAX", 1000)
    for encoding, bomb in (("gzip", gzip.compress(bytes(100_000))), ("zstd", zstandard.compress(bytes(100_000)))):
        request = RequestLine(
            method="POST",
            target="/",
            http_version="1.1",
            headers=(("content-encoding", encoding),),
            continued=False,
        )
        assert decoded_body(request, bomb) == bomb
