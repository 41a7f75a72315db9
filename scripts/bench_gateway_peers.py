"""Who is measured by bench_gateway.py: a model that stamps its chunks, alone, behind LiteLLM, and behind Torpor.

Each is a process of its own. LiteLLM gets a virtual environment below .tools, because it brings a hundred packages.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
LITELLM = "litellm[proxy]==1.83.0"
LITELLM_VENV = ROOT / ".tools" / "litellm"
START_SECONDS = 120
FIRST_BYTE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    url: str
    process: subprocess.Popen[bytes] | None

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    def memory_mb(self) -> float:
        """Resident memory of the peer's process with its children; 0 for the model itself."""
        return sum(_resident_kb(pid) for pid in _tree(self.process.pid)) / 1024 if self.process else 0.0


def _tree(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(inner for child in children for inner in _tree(int(child)))]


def _resident_kb(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) if found else 0


@asynccontextmanager
async def peers(scratch: Path, *, chunks: int, chunk_ms: float, with_litellm: bool) -> AsyncGenerator[list[Peer]]:
    async with AsyncExitStack() as stack:
        model = await _start(stack, scratch, "model", str(chunks), str(chunk_ms))
        torpor = await _start(stack, scratch, "torpor", model.url, str(scratch))
        litellm = [await _start_litellm(stack, scratch, model.url)] if with_litellm else []
        yield [Peer("no proxy", model.url, None), torpor, *litellm]


async def _start(stack: AsyncExitStack, scratch: Path, role: str, *arguments: str) -> Peer:
    command = [sys.executable, str(Path(__file__)), role, *arguments]
    with (scratch / f"{role}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=ROOT)
    stack.callback(_stop, process)
    assert process.stdout is not None
    url = (await asyncio.to_thread(process.stdout.readline)).decode().strip()
    if not url:
        raise SystemExit(f"bench: {role} did not start:\n{(scratch / f'{role}.log').read_text()}")
    return Peer(role, url, process)


async def _start_litellm(stack: AsyncExitStack, scratch: Path, upstream: str) -> Peer:
    if not (LITELLM_VENV / "bin/litellm").exists():
        subprocess.run([sys.executable, "-m", "venv", str(LITELLM_VENV)], check=True)
        subprocess.run([str(LITELLM_VENV / "bin/pip"), "install", "-q", LITELLM], check=True)
    port = _free_port()
    model = {"model": "openai/bench", "api_base": f"{upstream}/v1", "api_key": "any"}
    config = {
        "model_list": [{"model_name": "bench", "litellm_params": model}],
        "litellm_settings": {"telemetry": False},
    }
    (scratch / "litellm.yaml").write_text(json.dumps(config))
    command = [str(LITELLM_VENV / "bin/litellm"), "--config", str(scratch / "litellm.yaml"), "--host", "127.0.0.1"]
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    environment["PATH"] = f"{LITELLM_VENV / 'bin'}:{environment['PATH']}"
    with (scratch / "litellm.log").open("wb") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, env=environment)
    stack.callback(_stop, process)
    deadline = time.monotonic() + START_SECONDS
    while not await _healthy(port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"bench: LiteLLM did not start:\n{(scratch / 'litellm.log').read_text()[-3000:]}")
        await asyncio.sleep(0.5)
    return Peer("litellm", f"http://127.0.0.1:{port}", process)


async def _healthy(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.write(b"GET /health/liveliness HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    status = await reader.readline()
    writer.close()
    return b" 200 " in status


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)  # What asyncio.run turns into a cancellation, so that nothing is left behind.
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


async def serve_model(chunks: int, chunk_ms: float) -> None:
    """Chat Completions whose chunks say when the request was received (the first one) and when they were written."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await _request_head(reader):
            body = await reader.readexactly(int(re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)[1]))
            received = time.monotonic_ns()
            if not json.loads(body).get("stream"):
                message = {"role": "assistant", "content": "done"}
                whole = json.dumps({**_envelope("chat.completion"), "choices": [_choice("message", message)]}).encode()
                lead = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(whole)
                writer.write(lead + whole)
                if _closes(head):
                    break
                continue
            await asyncio.sleep(FIRST_BYTE_SECONDS)
            lead = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            for number in range(chunks):
                if number:
                    await asyncio.sleep(chunk_ms / 1000)
                stamp = f"t{received if number == 0 else 0}:{time.monotonic_ns()}t "
                writer.write(lead + _chunk(_event(stamp)))
                lead = b""
            writer.write(_chunk(_event(None)) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            if _closes(head):
                break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


async def _request_head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


def _closes(head: bytes) -> bool:
    return b"connection: close" in head.lower()


def _envelope(kind: str) -> dict[str, object]:
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": "bench"} | (
        {"usage": usage} if kind == "chat.completion" else {}
    )


def _choice(field: str, value: dict[str, str], reason: str | None = "stop") -> dict[str, object]:
    return {"index": 0, field: value, "finish_reason": reason}


def _event(text: str | None) -> bytes:
    delta = {"role": "assistant", "content": text} if text is not None else {}
    choice = _choice("delta", delta, None if text is not None else "stop")
    return b"data: " + json.dumps({**_envelope("chat.completion.chunk"), "choices": [choice]}).encode() + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def serve_torpor(upstream_url: str, scratch: Path) -> None:
    """The real gateway with the real torpor-init as its relay, and a log on the disk of the scratch directory."""
    sys.path.insert(0, str(ROOT))
    from tests.integration.gateway_stage import CLOCK, Stage, free_address, start_init

    from torpor.config import KeySource, Secret, Upstream
    from torpor.core.ids import new_session_id
    from torpor.db import sessions
    from torpor.db.database import open_database
    from torpor.node import spare_collections

    directory = scratch / "torpor"
    directory.mkdir()
    key = KeySource(value=Secret("any"))
    upstream = Upstream(name="openai", family="openai", base_url=f"{upstream_url}/v1", key=key, bearer=True)
    session_id = new_session_id(CLOCK.wall_ns())
    database = await open_database(f"sqlite://{directory / 'torpor.db'}", clock=CLOCK)
    await database.write(
        lambda tx: sessions.create(tx, session_id=session_id, name=None, spec={}, wall_ns=CLOCK.wall_ns()), durable=True
    )
    await database.close()
    address = free_address()
    process = start_init(directory, address)
    stage = Stage(
        model=None, directory=directory, address=address, session_id=session_id, upstreams=(upstream,), process=process
    )
    try:
        async with stage.node():
            spare_collections()  # As a node does.
            print(stage.url, flush=True)
            await asyncio.Event().wait()
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    if role == "model":
        asyncio.run(serve_model(int(arguments[0]), float(arguments[1])))
    else:
        asyncio.run(serve_torpor(arguments[0], Path(arguments[1])))
