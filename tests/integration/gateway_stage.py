"""A stage for the gateway: a scripted model, the real torpor-init on FIFOs, a real database, nodes that come and go.

Clients connect to the relay of init on a loopback address of the stage's own, so that the ports are the real ones.
"""

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torpor.config import FAKE_KEY, GATEWAY_PORT, PROXY_PORT, KeySource, Secret, Upstream, guest_environment
from torpor.core.call import Call, response_bytes
from torpor.core.checkpoint import OpenStream, StreamFate, stream_fate
from torpor.core.clock import SystemClock
from torpor.core.errors import SandboxFailed
from torpor.core.events import Event, Kind
from torpor.core.ids import CallId, NodeId, SessionId, StreamId, new_session_id
from torpor.core.redo import RedoSet
from torpor.db import calls, log, sessions
from torpor.db.database import Database, open_database
from torpor.gateway.server import Gateway
from torpor.sandbox.fifos import Pulse, open_guest_ends
from torpor.sandbox.frames import AgentSpec
from torpor.sandbox.link import Link
from torpor.testing.model_scripts import Script, plain
from torpor.testing.model_server import ModelServer, serve_model

INIT_SOURCE = Path(__file__).parents[2] / "native" / "init"
REAL_KEY = "sk-real-0123456789abcdefghijklmnopqrstuvwxyz"
CLOCK = SystemClock()
_addresses = itertools.count()


def free_address() -> str:
    """A loopback address on which nobody listens."""
    while True:
        number = next(_addresses)
        address = f"127.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}.{1 + number % 250}"
        with socket.socket() as probe:
            try:
                probe.bind((address, GATEWAY_PORT))
            except OSError:
                continue
        return address


@dataclass(slots=True)
class Node:
    """One node that drives the stage's session."""

    gateway: Gateway
    link: Link
    database: Database
    session_id: SessionId
    owner_token: int
    fates: dict[int, StreamFate] = field(default_factory=dict)

    async def events(self, *kinds: Kind) -> list[Event]:
        events = await self.database.read(lambda tx: log.events(tx, self.session_id))
        return [event for event in events if not kinds or event.kind in kinds]

    async def calls(self) -> list[Call]:
        return await self.database.read(lambda tx: calls.load_calls(tx, self.session_id))

    async def logged_response(self, call: Call, attempt: int = -1) -> bytes:
        """What the log says that an agent's socket received."""
        made = call.attempts[attempt]
        assert made.head is not None
        chunks = await self.database.read(lambda tx: calls.load_chunks(tx, call.call_id, made.number))
        return response_bytes(made.head, [chunk.data for chunk in chunks], finished=made.finished)

    async def logged(self, kind: Kind, count: int = 1) -> list[Event]:
        """Wait until there are so many events of a kind."""
        while len(found := await self.events(kind)) < count:
            await asyncio.sleep(0)
        return found


class OnCall:
    """The runtime's hook: counts, and can hold."""

    def __init__(self) -> None:
        self.calls: list[CallId] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.changed = Pulse()

    async def __call__(self, call_id: CallId) -> None:
        self.calls.append(call_id)
        self.changed.fire()
        await self.gate.wait()


@dataclass(slots=True)
class Stage:
    model: ModelServer
    directory: Path
    address: str
    session_id: SessionId
    upstreams: tuple[Upstream, ...]
    process: subprocess.Popen[bytes]
    on_call: OnCall = field(default_factory=OnCall)

    @property
    def database_path(self) -> Path:
        return self.directory / "torpor.db"

    @property
    def url(self) -> str:
        return f"http://{self.address}:{GATEWAY_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """A client's environment inside the sandbox."""
        inside = {name: value.replace("127.0.0.1", self.address) for name, value in guest_environment().items()}
        inside = {name: value for name, value in inside.items() if "proxy" not in name.lower()}
        return {"PATH": os.environ["PATH"], "HOME": str(self.directory), **inside}

    async def spawn(self, program: str, **environment: str) -> asyncio.subprocess.Process:
        """A Python client as a process of its own."""
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**self.environment, **environment},
        )

    async def output(self, program: str, **environment: str) -> str:
        process = await self.spawn(program, **environment)
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        return out.decode()

    async def raw(self, request: bytes, port: int = GATEWAY_PORT) -> bytes:
        """All bytes that a socket gets for the bytes of a request; a reset is raised."""
        reader, writer = await asyncio.open_connection(self.address, port)
        try:
            writer.write(request)
            return await reader.read(-1)
        finally:
            writer.close()

    @asynccontextmanager
    async def node(self, *, incarnation: int = 1, redo: RedoSet | None = None) -> AsyncGenerator[Node]:
        """A node that takes the session, adopts the sandbox, and dies without a word at the end."""
        database = await open_database(f"sqlite://{self.database_path}", clock=CLOCK)
        try:
            token = await self._acquire(database)
            gateway = Gateway(
                database=database,
                session_id=self.session_id,
                owner_token=token,
                clock=CLOCK,
                upstreams=self.upstreams,
                on_call=self.on_call,
            )
            link = await Link.open(
                to_guest=self.directory / "to_guest", from_guest=self.directory / "from_guest", clock=CLOCK
            )
            node = Node(gateway, link, database, self.session_id, token)
            async with asyncio.TaskGroup() as group:
                group.create_task(gateway.run())
                group.create_task(link.run())
                driving = group.create_task(self._drive(group, node, incarnation, redo))
                try:
                    yield node
                finally:
                    gateway.close()
                    link.close()
                    driving.cancel()
        finally:
            await database.close()

    async def _begin(self, node: Node, incarnation: int) -> None:
        await node.database.write(
            lambda tx: sessions.set_incarnation(
                tx,
                session_id=self.session_id,
                owner_token=node.owner_token,
                incarnation=incarnation,
                wall_ns=CLOCK.wall_ns(),
            ),
            durable=True,
        )

    async def _acquire(self, database: Database) -> int:
        session = await database.read(lambda tx: sessions.get(tx, self.session_id))
        return await database.write(
            lambda tx: sessions.acquire(
                tx,
                session_id=self.session_id,
                seen_token=session.owner_token,
                node_id=NodeId("node_test"),
                boot_id="boot",
                pid=1,
                wall_ns=CLOCK.wall_ns(),
            ),
            durable=True,
        )

    async def _drive(self, group: asyncio.TaskGroup, node: Node, incarnation: int, redo: RedoSet | None) -> None:
        """What the runtime does: begin or adopt, then serve every new stream."""
        gateway, link = node.gateway, node.link
        await gateway.recover()
        adopted = any(event.incarnation == incarnation for event in await node.events())
        if not adopted:
            await self._begin(node, incarnation)
        known_redo, claimed = await gateway.load_incarnation(incarnation)
        by_id = {call.call_id: call for call in await node.calls()}
        await gateway.begin_incarnation(incarnation, redo or known_redo, adopted=adopted)
        for status in link.status.streams:
            if status.kind != "call":
                continue
            held = claimed.get(StreamId(status.stream))
            open_stream = OpenStream(
                stream=StreamId(status.stream),
                port=status.port,
                call_id=held.call_id if held else None,
                read=status.read,
                acknowledged=status.acknowledged,
                taken=status.taken,
                untouched_bytes=held.untouched_bytes if held else 0,
                attempt=held.attempt if held else 1,
            )
            fate = stream_fate(open_stream, by_id[held.call_id] if held else None, pump_alive=False)
            node.fates[status.stream] = fate
            position = status.read if held else status.acknowledged
            stream = link.inherit(status.stream, position=position, acknowledged=position)
            group.create_task(gateway.inherit(stream, open_stream, fate, incarnation=incarnation))
        try:
            while True:
                stream = await link.accept()
                group.create_task(gateway.serve(stream, incarnation=incarnation))
        except SandboxFailed:
            return


@asynccontextmanager
async def gateway_stage(
    directory: Path,
    *,
    script: Script = plain,
    key: str = REAL_KEY,
    read_seconds: float = 20.0,
    witness_path: Path | None = None,
) -> AsyncGenerator[Stage]:
    subprocess.run(["make", "-s", "-C", str(INIT_SOURCE)], check=True)
    async with serve_model(script=script, key=key, witness_path=witness_path) as model:
        upstreams = tuple(
            Upstream(
                name=family,
                family=family,
                base_url=f"{model.url}/v1" if family == "openai" else model.url,
                key=KeySource(value=Secret(key)),
                bearer=family == "openai",
                read_seconds=read_seconds,
            )
            for family in ("openai", "anthropic")
        )
        session_id = new_session_id(CLOCK.wall_ns())
        database = await open_database(f"sqlite://{directory / 'torpor.db'}", clock=CLOCK)
        await database.write(
            lambda tx: sessions.create(tx, session_id=session_id, name=None, spec={}, wall_ns=CLOCK.wall_ns()),
            durable=True,
        )
        await database.close()
        address = free_address()
        process = start_init(directory, address)
        try:
            yield Stage(
                model=model,
                directory=directory,
                address=address,
                session_id=session_id,
                upstreams=upstreams,
                process=process,
            )
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def start_init(directory: Path, address: str) -> subprocess.Popen[bytes]:
    fifos = {"to_guest": directory / "to_guest", "from_guest": directory / "from_guest"}
    for path in fifos.values():
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
    listen = [f"--listen={address}:{GATEWAY_PORT}", f"--listen={address}:{PROXY_PORT}"]
    arguments = [str(INIT_SOURCE / "build" / "torpor-init")]
    for one in listen:
        arguments += one.split("=")
    stdin, stdout = open_guest_ends(**fifos)
    try:
        return subprocess.Popen([*arguments, "--run-dir", str(directory / "run")], stdin=stdin, stdout=stdout)
    finally:
        os.close(stdin)
        os.close(stdout)


def http_request(path: str, body: bytes, headers: Mapping[str, str] | None = None, method: str = "POST") -> bytes:
    fields = {"host": "gateway", "content-type": "application/json", "content-length": str(len(body))}
    lines = [
        f"{method} {path} HTTP/1.1",
        *(f"{name}: {value}" for name, value in (fields | dict(headers or {})).items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


AGENT = AgentSpec(arguments=("sleep", "1000"), cwd="/", environment={})
CREDENTIAL = {"authorization": f"Bearer {FAKE_KEY}"}
