"""The scripted model server: real HTTP as OpenAI, Anthropic and Google speak it, with a count of every request.

    python -m torpor.testing.model_server --port 0 --script coding --witness witness.jsonl

prints two lines, the URL of the model and the URL of its control: `GET /witness`, `GET|POST|DELETE /faults`,
`POST /refuse` (closes the model's listener) and `POST /accept`. In a test: `async with serve_model(...) as server`.
"""

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h11
import msgspec

from torpor.core.clock import SystemClock
from torpor.testing.model_answering import Answering
from torpor.testing.model_connection import ClientLeft, Connection, Request
from torpor.testing.model_faults import FAULT_HEADER, Fault, FaultRule, FaultTable
from torpor.testing.model_scripts import Pace, Script, Try, coding, paced, script_named
from torpor.testing.model_wire import Anthropic, OpenAIChat, Stamp, Wire
from torpor.testing.model_wire_gemini import gemini_wire
from torpor.testing.model_wire_responses import Compaction, KeptResponses, OpenAIResponses
from torpor.testing.model_witness import Witness, logical_digest

WIRES: dict[str, Wire] = {
    "/v1/chat/completions": OpenAIChat(),
    "/v1/responses": OpenAIResponses(),
    "/v1/responses/compact": Compaction(),
    "/v1/messages": Anthropic(),
}
MODELS = ("scripted-large", "scripted-small")
TOKEN_COUNTS = {"/v1/messages/count_tokens": "input_tokens", "/v1/responses/input_tokens": "input_tokens"}
RAW_ANSWERS = {
    "/v1/embeddings": ("application/json", b'{"object":"list","data":[{"embedding":[0.5]}]}'),
    "/api/chat": ("application/x-ndjson", b'{"message":{"content":"hi"}}\n{"done":true}\n'),
}
"""Addresses of no dialect that Torpor knows."""


class ModelServer:
    """Answers by `script`; made by `serve_model`.

    Attributes:
        url, control_url: base addresses without a path.
        faults, witness: what goes wrong, and what happened.
        requests: every model request that was read, with its headers, in memory.
    """

    def __init__(self, *, script: Script, witness: Witness, key: str | None, host: str) -> None:
        self.script = script
        self.witness = witness
        self.faults = FaultTable()
        self.requests: list[Request] = []
        self.kept = KeptResponses()
        self.url = ""
        self.control_url = ""
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._clock = SystemClock()
        self._key = key
        self._host = host
        self._listener: asyncio.Server | None = None

    async def listen(self, group: asyncio.TaskGroup, port: int, control_port: int) -> None:
        self._group = group
        control = await asyncio.start_server(self._accept_control, self._host, control_port)
        self._control = control
        self.control_url = f"http://{self._host}:{control.sockets[0].getsockname()[1]}"
        self._port = port
        await self.accept()

    async def accept(self) -> None:
        """Listen (again), on the same port as before."""
        if self._listener is None:
            self._listener = await asyncio.start_server(self._accept_model, self._host, self._port)
            self._port = self._listener.sockets[0].getsockname()[1]
            self.url = f"http://{self._host}:{self._port}"

    def refuse(self) -> None:
        """Close the listener: the kernel refuses new connections; open ones go on."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def close(self) -> None:
        self.refuse()
        self._control.close()
        for task in self._tasks:
            task.cancel()

    def _accept_model(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._start(self._serve(Connection(reader, writer), control=False))

    def _accept_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._start(self._serve(Connection(reader, writer), control=True))

    def _start(self, serving: Coroutine[Any, Any, None]) -> None:
        assert self._group is not None
        task = self._group.create_task(serving)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: Connection, *, control: bool) -> None:
        try:
            while (request := await connection.request()) is not None:
                await (self._control_request if control else self._model_request)(connection, request)
                if connection.writer.is_closing() or connection.http.our_state is not h11.DONE:
                    break
                connection.http.start_next_cycle()
        except (ClientLeft, ConnectionError, h11.RemoteProtocolError, h11.LocalProtocolError):
            pass  # The witness has how each request ended; a client that leaves is no fault of this server's.
        finally:
            await connection.close()

    async def _control_request(self, connection: Connection, request: Request) -> None:
        answer: object = {}
        match request.method, request.path:
            case "GET", "/witness":
                answer = self.witness.report()
            case "GET", "/faults":
                answer = self.faults.rules
            case "POST", "/faults":
                self.faults.add(msgspec.json.decode(request.body, type=FaultRule))
            case "DELETE", "/faults":
                self.faults.clear()
            case "POST", "/refuse":
                self.refuse()
            case "POST", "/accept":
                await self.accept()
            case _:
                await connection.respond(404, b"{}")
                return
        await connection.respond(200, msgspec.json.encode(answer))

    async def _model_request(self, connection: Connection, request: Request) -> None:
        self.requests.append(request)
        wire = WIRES.get(request.path) or gemini_wire(request.path, request.query)
        if wire is None or request.method != "POST":
            await self._small_request(connection, request)
            return
        try:
            body = json.loads(request.body)
        except ValueError:
            await connection.respond(400, wire.error(400, "the body is not JSON"))
            return
        await self._logical_request(connection, request, wire, body)

    async def _logical_request(self, connection: Connection, request: Request, wire: Wire, body: Any) -> None:
        before = connection.sent_bytes
        conversation = wire.conversation(body, request.credential)
        number, attempt = self.witness.start(
            digest=logical_digest(request.path.replace(":streamGenerateContent", ":generateContent"), body),
            path=request.path,
            model=conversation.model,
            stream=conversation.stream,
            tool_results=len(conversation.tool_results),
        )
        rule = self.faults.choose(header=request.headers.get(FAULT_HEADER), attempt=attempt, body=request.body)
        outcome = "aborted"
        try:
            if self._key is not None and request.credential != self._key:
                await connection.respond(401, wire.error(401, f"Incorrect API key provided: {request.credential}"))
                outcome = "unauthorized"
                return
            this = Try(attempt=attempt, nonce=f"n{number}x{self._clock.wall_ns():x}")
            stamp = Stamp(
                nonce=this.nonce,
                created=self._clock.wall_ns() // 1_000_000_000,
                model=conversation.model,
                prompt_tokens=max(1, len(request.body) // 4),
                include_usage=conversation.include_usage,
            )
            answer = self.script(conversation, this)
            if request.path == "/v1/responses" and (receipt := self.kept.keep(body, answer, stamp)) is not None:
                await connection.respond(200, json.dumps(receipt).encode())
                outcome = "complete"
                return
            answering = Answering(connection, wire, answer, stamp, rule)
            await (answering.stream() if conversation.stream else answering.whole())
            outcome = rule.fault.value if rule else "complete"
        except ClientLeft:
            if rule is not None:
                outcome = rule.fault.value
            raise
        finally:
            self.witness.end(number=number, outcome=outcome, sent_bytes=connection.sent_bytes - before)

    async def _small_request(self, connection: Connection, request: Request) -> None:
        """What costs nothing: model lists, token counts, Claude Code's HEAD."""
        if request.method == "HEAD":
            await connection.head(200, [("content-length", "0")])
            await connection.send(h11.EndOfMessage())
        elif request.path in TOKEN_COUNTS or request.path.endswith(":countTokens"):
            field = TOKEN_COUNTS.get(request.path, "totalTokens")
            await connection.respond(200, json.dumps({field: max(1, len(request.body) // 4)}).encode())
        elif request.path.startswith("/v1/responses/"):
            await self._kept_response(connection, request)
        elif request.path == "/v1beta/models" or (request.path == "/v1/models" and "x-goog-api-key" in request.headers):
            models = [{"name": f"models/{name}", "displayName": name} for name in MODELS]
            await connection.respond(200, json.dumps({"models": models}).encode())
        elif request.path in RAW_ANSWERS:
            kind, body = RAW_ANSWERS[request.path]
            rule = self.faults.choose(header=request.headers.get(FAULT_HEADER), attempt=1, body=request.body)
            if rule is not None and rule.fault is Fault.SILENT:  # The only fault that these know.
                await connection.pause(None)
            await connection.respond(200, body, content_type=kind)
        elif request.path == "/v1/models" and "anthropic-version" in request.headers:
            data = [{"type": "model", "id": name, "display_name": name, "created_at": "2026-01-01"} for name in MODELS]
            listing = {"data": data, "has_more": False, "first_id": MODELS[0], "last_id": MODELS[-1]}
            await connection.respond(200, json.dumps(listing).encode())
        elif request.path == "/v1/models":
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "torpor"} for name in MODELS]
            await connection.respond(200, json.dumps({"object": "list", "data": models}).encode())
        else:
            await connection.respond(404, OpenAIChat().error(404, f"no such path: {request.path}"))

    async def _kept_response(self, connection: Connection, request: Request) -> None:
        """What is asked of an answer that is kept: no model thinks for it."""
        found = self.kept.ask(request.method, request.path, request.query)
        if found is None:
            await connection.respond(404, OpenAIChat().error(404, "no such response"))
        elif isinstance(found, dict):
            await connection.respond(200, json.dumps(found).encode())
        else:
            await connection.head(200, [("content-type", OpenAIResponses.content_type)])
            if request.headers.get(FAULT_HEADER) == Fault.CUT_MID:
                found = found[:-1]
            for event in found:
                await connection.send(h11.Data(data=event))
            await connection.send(h11.EndOfMessage())


@asynccontextmanager
async def serve_model(
    *,
    script: Script | None = None,
    witness_path: Path | None = None,
    key: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    control_port: int = 0,
) -> AsyncGenerator[ModelServer]:
    """Run a scripted model while the context lasts; with `key`, requests without it get 401."""
    with Witness(witness_path) as witness:
        server = ModelServer(script=script or coding(), witness=witness, key=key, host=host)
        async with asyncio.TaskGroup() as group:
            await server.listen(group, port, control_port)
            try:
                yield server
            finally:
                server.close()


async def _run(options: argparse.Namespace) -> None:
    pace = Pace(first_byte_seconds=options.first_byte_seconds, chunk_seconds=options.chunk_seconds)
    named = script_named(
        options.script, turns=options.turns, slow_step=options.slow_step, slow_seconds=options.slow_seconds
    )
    script = paced(named, pace)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serve_model(
        script=script,
        witness_path=options.witness,
        key=options.key,
        host=options.host,
        port=options.port,
        control_port=options.control_port,
    ) as server:
        sys.stdout.write(f"{server.url}\n{server.control_url}\n")
        sys.stdout.flush()
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="model_server", description="A scripted model that counts every request.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--control-port", type=int, default=0)
    parser.add_argument("--script", choices=("coding", "plain", "leaky", "long", "huge"), default="coding")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--slow-step", type=int, default=-1, help="step whose tool takes --slow-seconds")
    parser.add_argument("--slow-seconds", type=float, default=0.0)
    parser.add_argument("--first-byte-seconds", type=float, default=0.0)
    parser.add_argument("--chunk-seconds", type=float, default=0.0)
    parser.add_argument("--witness", type=Path, help="append-only file of every request")
    parser.add_argument("--key", help="the only API key that is accepted")
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
