"""What a hostile agent can do to the gateway: it is refused or bounded, and its neighbours do not notice.

Every attack is made by one session while another one works in the same process, which is the worst case: nodes are
processes of their own. After it, both get an honest answer.
"""

import asyncio
import gc
import gzip
import itertools
import re
import socket
import struct
import tracemalloc
import zlib
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard
from tests.integration.gateway_stage import Node, Stage, gateway_stage, http_request, with_usage_asked
from tests.integration.test_gateway import CHAT, client, question, slow, status_of

from torpor.config import GATEWAY_PORT
from torpor.core.events import Kind
from torpor.gateway import pumps, server
from torpor.gateway.request import BODY_BYTES_MAX, HEAD_BYTES_MAX, SMALL_BODY_BYTES_MAX, Room
from torpor.sandbox.frames import STREAMS_MAX, StreamStatus

POST = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
BODY = question()
STATUS_LINE = re.compile(rb"^HTTP/1\.1 \d", re.MULTILINE)
LENGTH = f"content-length: {len(BODY)}\r\n"
CHUNKED = f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n"


@dataclass(slots=True)
class Neighbours:
    """The session that attacks, and the one beside it."""

    hostile: Stage
    node: Node
    honest: Stage

    async def still_work(self) -> None:
        for stage in (self.honest, self.hostile):
            async with asyncio.timeout(60):
                assert status_of(await stage.raw(http_request(CHAT, question("are you there")))) == 200


@asynccontextmanager
async def neighbours(directory: Path) -> AsyncGenerator[Neighbours]:
    paths = [directory / name for name in ("hostile", "honest")]
    for path in paths:
        path.mkdir()
    async with (
        gateway_stage(paths[0]) as hostile,
        gateway_stage(paths[1]) as honest,
        hostile.node() as node,
        honest.node(),
    ):
        yield Neighbours(hostile, node, honest)


def smuggled(*fields: str, body: bytes = BODY) -> bytes:
    return (POST + "".join(f"{field}\r\n" for field in fields)).encode() + b"\r\n" + body


REFUSED = {
    "length and chunks": smuggled(LENGTH.strip(), "transfer-encoding: chunked", body=CHUNKED),
    "chunks and length": smuggled("transfer-encoding: chunked", "content-length: 3", body=CHUNKED),
    "two lengths": smuggled("content-length: 3", LENGTH.strip()),
    "two lengths in one": smuggled(f"content-length: 3, {len(BODY)}"),
    "length with a sign": smuggled(f"content-length: +{len(BODY)}"),
    "length of letters": smuggled("content-length: 0x10"),
    "length of many digits": smuggled("content-length: " + "9" * 5000),
    "negative length": smuggled("content-length: -1"),
    "chunked twice": smuggled("transfer-encoding: chunked, chunked", body=CHUNKED),
    "chunks of another kind": smuggled("transfer-encoding: xchunked", body=CHUNKED),
    "chunks within gzip": smuggled("transfer-encoding: gzip, chunked", body=CHUNKED),
    "space before the colon": smuggled(f"content-length : {len(BODY)}"),
    "chunk size of letters": smuggled("transfer-encoding: chunked", body=b"zz\r\n\r\n0\r\n\r\n"),
    "chunk size with a sign": smuggled("transfer-encoding: chunked", body=b"+5\r\nhello\r\n0\r\n\r\n"),
    "endless chunk size": smuggled("transfer-encoding: chunked", body=b"0" * 300_000),
    "chunk longer than it says": smuggled("transfer-encoding: chunked", body=b"2\r\nhello\r\n0\r\n\r\n"),
    "carriage return in a value": smuggled("x-a: b\rx-evil: 1", LENGTH.strip()),
    "nul in a value": smuggled("x-a: b\x00c", LENGTH.strip()),
    "no colon": smuggled("x-evil", LENGTH.strip()),
    "empty name": smuggled(": evil", LENGTH.strip()),
    "space in the target": f"POST {CHAT} evil HTTP/1.1\r\nhost: x\r\n{LENGTH}\r\n".encode() + BODY,
    "two hosts": smuggled("host: y", LENGTH.strip()),
    "many headers": smuggled(*(f"x-{number}: y" for number in range(20_000)), LENGTH.strip()),
    "one large header": smuggled(f"x: {'y' * HEAD_BYTES_MAX}", LENGTH.strip()),
    "absolute form": b"POST http://127.0.0.1:22/ HTTP/1.1\r\nhost: x\r\n\r\n",
    "other scheme": b"GET file:///etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n",
    "two slashes": b"GET //127.0.0.1:22/v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    "backslash": b"GET \\\\evil\\v1 HTTP/1.1\r\nhost: x\r\n\r\n",
    "star": b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" * 100,
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2 + b"\r\n\r\n",
    "noise": bytes(number * 37 % 256 for number in range(300_000)),
    "large body": smuggled(f"content-length: {BODY_BYTES_MAX + 1}"),
    "deep path": f"GET /v1/{'a/' * 60_000} HTTP/1.1\r\nhost: x\r\n\r\n".encode(),
}


async def test_what_is_not_one_plain_request_is_refused_and_goes_nowhere(tmp_path: Path) -> None:
    async with neighbours(tmp_path) as scene:
        for name, attack in REFUSED.items():
            received = await scene.hostile.raw(attack)
            assert received.startswith((b"HTTP/1.1 4", b"HTTP/1.1 50")), (name, received[:100])
            assert len(STATUS_LINE.findall(received)) == 1, name
        assert scene.hostile.model.requests == []
        assert await scene.node.calls() == []
        await scene.still_work()


NO_TEXT = {
    "a model": b'{"model": "m\xde", "stream": true}',
    "options": b'{"model": "m", "stream": true, "stream_options": {"include_usage\xde": true}}',
    "a limit": b'{"model": "m", "max_tokens": "\xde", "generationConfig": {"candidateCount\xde": 1}}',
    "a key": b'{"model": "m", "stream\xde": true}',
}


@pytest.mark.parametrize("budget", [None, "9"])
async def test_json_that_is_no_text_is_the_providers_to_refuse(tmp_path: Path, budget: str | None) -> None:
    """Bytes that are not UTF-8 stand where the gateway looks: it sees nothing, and lives."""
    async with gateway_stage(tmp_path, budget=budget) as stage, stage.node() as node:
        for name, body in NO_TEXT.items():
            received = await stage.raw(http_request(CHAT, body))
            assert status_of(received) == 400, name
            if budget is None:
                assert stage.model.requests[-1].body.endswith(body[1:]), name
        assert len(await node.calls()) == len(NO_TEXT)
        assert status_of(await stage.raw(http_request(CHAT, question()))) == (400 if budget else 200)


LENIENT = {
    "a folded header": smuggled("x-a: b\r\n\tx-evil: 1", LENGTH.strip()),
    "bare line feeds": smuggled(LENGTH.strip()).replace(b"\r\n", b"\n", 4),
    "a length twice": smuggled(LENGTH.strip(), LENGTH.strip()),
    "chunk extensions": smuggled("transfer-encoding: chunked", body=CHUNKED.replace(b"\r\n", b";evil=1\r\n", 1)),
    "trailers": smuggled("transfer-encoding: chunked", body=CHUNKED[:-2] + b"content-length: 3\r\nx-evil: 1\r\n\r\n"),
    "a second request": smuggled(LENGTH.strip()) + b"POST /v1/files HTTP/1.1\r\nhost: x\r\n\r\n",
}


async def test_what_is_taken_all_the_same_goes_on_as_one_plain_request(tmp_path: Path) -> None:
    """The provider never sees how the agent had framed a request: it is read whole, and written anew."""
    async with neighbours(tmp_path) as scene:
        for number, (name, attack) in enumerate(LENIENT.items(), 1):
            received = await scene.hostile.raw(attack)
            assert status_of(received) == 200, name
            assert len(STATUS_LINE.findall(received)) == 1, name
            assert len(scene.hostile.model.requests) == number
            sent = scene.hostile.model.requests[-1]
            assert sent.body == with_usage_asked(BODY), name
            assert "x-evil" not in sent.headers, name
            assert sent.headers["content-length"] == str(len(sent.body)), name
            assert "transfer-encoding" not in sent.headers, name
        await scene.still_work()


async def test_no_answer_carries_a_header_that_the_agent_made_up(tmp_path: Path) -> None:
    """Wherever a request's own words stand in an answer, they stand in JSON."""
    evil = "%0d%0ax-evil:%201"
    async with neighbours(tmp_path) as scene:
        for path in (f"/{evil}", f"/v1/{evil}", f"/v1/models/{evil}", f"/torpor/v1/{evil}", '/v1/"}\\x-evil:1'):
            for method in ("GET", "POST", "x-evil"):
                received = await scene.hostile.raw(http_request(path, b"", method=method))
                head = received.partition(b"\r\n\r\n")[0].lower()
                assert status_of(received) in {404, 405}
                assert b"x-evil" not in head
        await scene.still_work()


def bombs() -> dict[str, tuple[str, bytes]]:
    plain = b'{"model": "m", "messages": [], "x": "' + b"a" * (BODY_BYTES_MAX + 1) + b'"}'
    packed = gzip.compress(plain, 9)
    window = zstandard.ZstdCompressionParameters(window_log=27, compression_level=1)
    return {
        "gzip": ("gzip", packed),
        "x-gzip": ("X-GZIP", packed),
        "deflate": ("deflate", zlib.compress(plain, 9)),
        "zstd": ("zstd", zstandard.compress(plain, 1)),
        "zstd with a large window": ("zstd", zstandard.ZstdCompressor(compression_params=window).compress(plain)),
        "gzip in gzip": ("gzip", gzip.compress(packed, 9)),
        "gzip in gzip, announced": ("gzip, gzip", gzip.compress(packed, 9)),
        "damaged": ("gzip", packed[: len(packed) // 2]),
        "an unknown encoding": ("br", packed),
    }


async def test_bodies_that_explode_are_unpacked_no_further_than_a_body_may_be(tmp_path: Path) -> None:
    async with neighbours(tmp_path) as scene:
        gc.collect()
        tracemalloc.start()
        try:
            for name, (encoding, packed) in bombs().items():
                assert len(packed) < SMALL_BODY_BYTES_MAX
                tracemalloc.reset_peak()
                received = await scene.hostile.raw(http_request(CHAT, packed, {"content-encoding": encoding}))
                assert tracemalloc.get_traced_memory()[1] < 6 * BODY_BYTES_MAX, name
                # It is the provider's to refuse; the log has it as it was sent.
                assert len(STATUS_LINE.findall(received)) == 1, name
                assert scene.hostile.model.requests[-1].body == packed, name
        finally:
            tracemalloc.stop()
        await scene.still_work()


async def test_requests_that_never_end_hold_their_connections_and_nothing_else(tmp_path: Path) -> None:
    """Slow loris: heads and bodies that stop in the middle, more than there may be connections."""
    kinds = [b"POST ", POST.encode(), POST.encode() + b"content-length: 9999\r\n\r\n{", POST.encode() + b"x: "]
    async with neighbours(tmp_path) as scene, AsyncExitStack() as attack:
        for beginning in itertools.islice(itertools.cycle(kinds), STREAMS_MAX + 40):
            await attack.enter_async_context(client(scene.hostile, beginning))
        status = await scene.node.link.cut(30)
        scene.node.link.release()
        assert len([stream for stream in status.streams if stream.kind == "call"]) <= STREAMS_MAX
        assert status_of(await scene.honest.raw(http_request(CHAT, BODY))) == 200
        await attack.aclose()
        await scene.still_work()


async def test_large_bodies_take_turns_for_memory_and_all_come_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for two at a time: who stops in the middle holds up other large ones of its session, until it leaves."""
    monkeypatch.setattr(server, "Room", lambda: Room(2 * BODY_BYTES_MAX))
    large = question("x" * (4 * SMALL_BODY_BYTES_MAX))
    head = POST.encode() + b"transfer-encoding: chunked\r\n\r\n"
    whole = head + f"{len(large):x}\r\n".encode() + large + b"\r\n0\r\n\r\n"
    async with neighbours(tmp_path) as scene:
        async with (
            client(scene.hostile, whole[:-1]) as one,
            client(scene.hostile, whole[:-1]) as other,
            asyncio.TaskGroup() as group,
        ):
            waiting = [group.create_task(scene.hostile.raw(whole)) for _ in range(4)]
            small = [await scene.hostile.raw(http_request(CHAT, question(str(number)))) for number in range(3)]
            assert {status_of(answer) for answer in small} == {200}
            assert not any(task.done() for task in waiting)
            assert len(await scene.node.calls()) == 3
            for _, writer in (one, other):
                reset_on_close(writer)
                writer.transport.abort()
        assert {status_of(task.result()) for task in waiting} == {200}
        await scene.still_work()


async def test_a_flood_of_connections_is_served_in_its_turn(tmp_path: Path) -> None:
    """Thousands, opened and dropped at once in every way; no stream is left over."""
    async with neighbours(tmp_path) as scene:

        async def flood(number: int) -> None:
            for turn in range(100):
                try:
                    _, writer = await asyncio.open_connection(scene.hostile.address, GATEWAY_PORT)
                except OSError:
                    continue
                writer.write((b"", b"GET / HT", b"\0" * 100, http_request("/v1/files", b""))[(number + turn) % 4])
                if turn % 2:
                    reset_on_close(writer)
                writer.transport.abort()

        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(flood(number))
            assert status_of(await scene.honest.raw(http_request(CHAT, BODY))) == 200
        await scene.still_work()
        while any(stream.kind == "call" for stream in await streams_of_guest(scene.node)):
            pass
        while scene.node.gateway.open_streams():
            await scene.node.database.written.wait()


async def test_answers_that_nobody_waits_for_are_fetched_only_so_many_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that asks, leaves and asks for something else: pumps outlive it, so they are counted."""
    monkeypatch.setattr(pumps, "PUMPS_MAX", 3)
    async with gateway_stage(tmp_path, script=slow) as stage, stage.node() as node:
        async with AsyncExitStack() as asking:
            for number in range(6):
                await asking.enter_async_context(client(stage, http_request(CHAT, question(str(number)))))
            await node.logged(Kind.CALL_ANSWERING, 3)
            assert len(await node.calls()) == 3
        assert stage.model.witness.requests == 3


def reset_on_close(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def streams_of_guest(node: Node) -> tuple[StreamStatus, ...]:
    status = await node.link.cut(30)
    node.link.release()
    return tuple(status.streams)
