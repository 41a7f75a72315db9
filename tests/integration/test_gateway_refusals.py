"""What the gateway refuses without a call, and that a node that takes over refuses it with the same bytes."""

import asyncio
import json
from pathlib import Path

import pytest
from tests.integration.gateway_stage import gateway_stage, http_request

from torpor.config import GATEWAY_PORT, PROXY_PORT
from torpor.gateway.request import BODY_BYTES_MAX, HEAD_BYTES_MAX

GET = "GET / HTTP/1.1\r\nhost: x\r\n"
REFUSED = {
    "unknown path": (b"GET /v1/files HTTP/1.1\r\nhost: x\r\n\r\n", 404, "path_unknown"),
    "traversal": (b"GET /v1/models/.. HTTP/1.1\r\nhost: x\r\n\r\n", 404, "path_unknown"),
    "encoded traversal": (b"GET /v1/models/%2e%2e%2ffiles HTTP/1.1\r\nhost: x\r\n\r\n", 404, "path_unknown"),
    "wrong method": (b"DELETE /v1/models/m HTTP/1.1\r\nhost: x\r\n\r\n", 404, "path_unknown"),
    "absolute form": (b"GET http://evil/v1/models HTTP/1.1\r\nhost: x\r\n\r\n", 400, "target_refused"),
    "two slashes": (b"GET //evil/v1/models HTTP/1.1\r\nhost: x\r\n\r\n", 400, "target_refused"),
    "tunnel": (b"CONNECT evil:443 HTTP/1.1\r\nhost: x\r\n\r\n", 400, "target_refused"),
    "websocket": (f"{GET}connection: upgrade\r\nupgrade: websocket\r\n\r\n".encode(), 426, "websocket_refused"),
    "websocket of responses": (
        GET.replace("/", "/v1/responses", 1).encode() + b"connection: Upgrade\r\nupgrade: WebSocket\r\n\r\n",
        426,
        "websocket_refused",
    ),
    "unknown verb of gemini": (b"POST /v1beta/models/m:embed HTTP/1.1\r\nhost: x\r\n\r\n", 404, "path_unknown"),
    "traversal below a response": (b"GET /v1/responses/../files HTTP/1.1\r\nhost: x\r\n\r\n", 404, "path_unknown"),
    "http/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "http_version_unsupported"),
    "not http": (b"\x16\x03\x01\x02\x00\x01 hello\r\n\r\n", 400, "request_malformed"),
    "no host": (b"GET /v1/models HTTP/1.1\r\n\r\n", 400, "request_malformed"),
    "large head": (f"{GET}x: {'y' * HEAD_BYTES_MAX}\r\n\r\n".encode(), 431, "request_head_too_large"),
    "endless head": (f"{GET}x: {'y' * 3 * HEAD_BYTES_MAX}".encode(), 431, "request_head_too_large"),
    "large body": (
        f"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: {BODY_BYTES_MAX + 1}\r\n\r\n".encode(),
        413,
        "request_too_large",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_refused_is_refused_in_words_and_is_no_call(tmp_path: Path, name: str) -> None:
    request, status, code = REFUSED[name]
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        received = await stage.raw(request)
        assert received.startswith(f"HTTP/1.1 {status} ".encode())
        assert f"x-torpor-error: {code}".encode() in received
        assert b"x-should-retry: false" in received
        assert await node.calls() == []
        assert stage.model.requests == []


async def test_the_proxy_refuses_everything_and_says_why(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node():
        for request in (b"CONNECT github.com:443 HTTP/1.1\r\nhost: github.com\r\n\r\n", f"{GET}\r\n".encode()):
            received = await stage.raw(request, port=PROXY_PORT)
            assert received.startswith(b"HTTP/1.1 403 ")
            assert b"egress_denied" in received


async def test_an_upgrade_to_http_2_is_ignored_as_the_standard_says(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node():
        upgrade = {
            "connection": "upgrade, http2-settings",
            "upgrade": "h2c",
            "http2-settings": "AAMAAABkAAQAoAAAAAIAAAAA",
        }
        received = await stage.raw(http_request("/v1/models", b"", upgrade, method="GET"))
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_a_greeting_is_answered_here(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        received = await stage.raw(b"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert received.endswith(b"\r\n\r\n")
        assert await node.calls() == []


async def test_a_client_that_says_nothing_is_let_go(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node():
        reader, writer = await asyncio.open_connection(stage.address, GATEWAY_PORT)
        writer.write_eof()
        assert await reader.read(-1) == b""
        writer.close()


async def test_a_second_request_on_a_connection_is_not_read(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        body = json.dumps({"model": "m", "messages": []}).encode()
        once = http_request("/v1/messages", body)
        received = await stage.raw(once + once)
        assert received.count(b"HTTP/1.1 200") == 1
        [call] = await node.calls()
        assert call.request_bytes == len(once)


async def test_a_refusal_goes_on_under_another_node_with_the_same_bytes(tmp_path: Path) -> None:
    request = REFUSED["unknown path"][0]
    async with gateway_stage(tmp_path) as stage:
        async with stage.node():
            whole = await stage.raw(request)
        reader, writer = await asyncio.open_connection(stage.address, GATEWAY_PORT)
        writer.write(request[:10])
        async with stage.node():
            writer.write(request[10:20])
        async with stage.node():
            writer.write(request[20:])
            assert await reader.read(-1) == whole
        writer.close()
