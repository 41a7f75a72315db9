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
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TypeVar

from torpor.config import FAMILIES, GATEWAY_PORT, PROXY_PORT, KeySource, PriceRule, Secret, Upstream, guest_environment
from torpor.core.call import Call, response_bytes
from torpor.core.checkpoint import Checkpoint, OpenStream, StreamFate, stream_fate
from torpor.core.clock import Clock, SystemClock
from torpor.core.errors import NotFound, SandboxFailed
from torpor.core.events import Event, Kind
from torpor.core.ids import CallId, NodeId, SessionId, StreamId, new_session_id
from torpor.core.money import Price, parse_dollars
from torpor.core.redo import RedoSet
from torpor.core.usage import UsageHider
from torpor.db import calls, log, notes, sessions
from torpor.db.database import Database, Transaction, open_database
from torpor.gateway.agent_api import SpawnBody
from torpor.gateway.crossroads import Crossroads
from torpor.gateway.pumps import FirstByteAt
from torpor.gateway.server import Gateway, OpenCall
from torpor.gateway.waits import OnWait
from torpor.runtime.children import child_id_of
from torpor.sandbox.fifos import Pulse, open_guest_ends
from torpor.sandbox.frames import StreamStatus
from torpor.sandbox.link import Link
from torpor.snapshots.backend import LocalDirectory
from torpor.testing.model_scripts import Script, plain
from torpor.testing.model_server import ModelServer, serve_model

INIT_SOURCE = Path(__file__).parents[2] / "native" / "init"
PRICE = PriceRule(
    pattern="scripted-*",
    price=Price(input=Decimal(1), output=Decimal(10), cache_read=Decimal("0.1"), cache_write=Decimal(1)),
)
"""A token of output is 10 microdollars."""
REAL_KEY = "sk-real-0123456789abcdefghijklmnopqrstuvwxyz"
CLOCK = SystemClock()
T = TypeVar("T")
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


class WatchedDatabase:
    """The real database, which tells when something was written."""

    def __init__(self, database: Database) -> None:
        self.writes = 0
        self.written = Pulse()
        self.blobs = database.blobs
        self.read = database.read
        self.close = database.close
        self._database = database

    async def write(self, work: Callable[[Transaction], T], /, *, durable: bool, brief: bool = False) -> T:
        result = await self._database.write(work, durable=durable, brief=brief)
        self.writes += 1
        self.written.fire()
        return result


@dataclass(slots=True)
class Life:
    """One life of the sandbox under a node: its link, and the tasks that serve its streams."""

    link: Link
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def end(self) -> None:
        """As the runtime does when the sandbox is gone."""
        self.link.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)


@dataclass(slots=True)
class Node:
    """One node that drives the stage's session."""

    gateway: Gateway
    database: "WatchedDatabase"
    session_id: SessionId
    owner_token: int
    directory: Path
    group: asyncio.TaskGroup
    fates: dict[int, StreamFate] = field(default_factory=dict)
    lives: list[Life] = field(default_factory=list)

    @property
    def link(self) -> Link:
        return self.lives[-1].link

    async def live(
        self, incarnation: int, redo: RedoSet | None = None, cut: Mapping[StreamId, OpenCall] | None = None
    ) -> Life:
        """Adopt the sandbox if this incarnation is known, else begin it; then serve every new stream.

        With `cut`, go on as after a restore: it is what the checkpoint says of the streams in the image.
        """
        adopted = any(event.incarnation == incarnation for event in await self.events())
        if not adopted:
            await self._begin(incarnation)
        known_redo, claimed = await self.gateway.load_incarnation(incarnation)
        fifos = {"to_guest": self.directory / "to_guest", "from_guest": self.directory / "from_guest"}
        life = Life(await Link.open(**fifos, clock=CLOCK))
        self.lives.append(life)
        life.tasks.append(self.group.create_task(life.link.run()))
        await self.gateway.begin_incarnation(incarnation, redo or known_redo, adopted=adopted)
        by_id = {call.call_id: call for call in await self.calls()}
        for status in life.link.status.streams:
            if status.kind == "call":
                held = (cut or claimed).get(StreamId(status.stream))
                self._inherit(life, status, held, by_id, incarnation)
        life.tasks.append(self.group.create_task(self._accept(life, incarnation)))
        return life

    async def _begin(self, incarnation: int) -> None:
        await self.database.write(
            lambda tx: sessions.set_incarnation(
                tx,
                session_id=self.session_id,
                owner_token=self.owner_token,
                incarnation=incarnation,
                wall_ns=CLOCK.wall_ns(),
            ),
            durable=True,
        )

    def _inherit(
        self, life: Life, status: StreamStatus, held: OpenCall | None, by_id: Mapping[CallId, Call], incarnation: int
    ) -> None:
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
        alive = held is not None and self.gateway.pump_alive(held.call_id)
        fate = stream_fate(open_stream, by_id[held.call_id] if held else None, pump_alive=alive)
        self.fates[status.stream] = fate
        position = status.read if held else status.acknowledged
        stream = life.link.inherit(status.stream, position=position, acknowledged=status.acknowledged)
        serving = self.gateway.inherit(stream, open_stream, fate, incarnation=incarnation)
        life.tasks.append(self.group.create_task(serving))

    async def _accept(self, life: Life, incarnation: int) -> None:
        with suppress(SandboxFailed):
            while True:
                stream = await life.link.accept()
                serving = self.gateway.serve(stream, incarnation=incarnation)
                life.tasks.append(self.group.create_task(serving))

    async def events(self, *kinds: Kind) -> list[Event]:
        events = await self.database.read(lambda tx: log.events(tx, self.session_id))
        return [event for event in events if not kinds or event.kind in kinds]

    async def texts(self, kind: Kind) -> list[str]:
        """What was noted (`note.added`), or told (`agent.told`)."""
        told = await self.events(kind)
        return await self.database.read(lambda tx: [notes.get(tx, event) for event in told])

    async def calls(self) -> list[Call]:
        return await self.database.read(lambda tx: calls.load_calls(tx, self.session_id))

    async def logged_response(self, call: Call, attempt: int = -1) -> bytes:
        """What the log says that an agent's socket received, by the claim of the call's first stream."""
        made = call.attempts[attempt]
        assert made.head is not None
        chunks = await self.logged_chunks(call, attempt)
        intended = [event for event in await self.events(Kind.CALL_INTENDED) if event.call_id == call.call_id]
        if intended[0].data.get("hide_usage"):
            hider = UsageHider()
            chunks = [hider.feed(chunk) for chunk in chunks] + [hider.rest()] * made.finished
        return response_bytes(made.head, chunks, finished=made.finished)

    async def logged_chunks(self, call: Call, attempt: int = -1) -> list[bytes]:
        """What the provider sent."""
        number = call.attempts[attempt].number
        chunks = await self.database.read(lambda tx: calls.load_chunks(tx, call.call_id, number))
        return [chunk.data for chunk in chunks]

    async def logged(self, kind: Kind, count: int = 1) -> list[Event]:
        """Wait until there are so many events of a kind."""
        while True:
            written = self.database.writes
            if len(found := await self.events(kind)) >= count:
                return found
            while self.database.writes == written:
                await self.database.written.wait()


class OnCall:
    """The runtime's hook: counts, and can hold."""

    def __init__(self) -> None:
        self.calls: list[CallId] = []
        self.first_bytes: list[FirstByteAt] = []
        self._asked = Pulse()
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, call_id: CallId, first_byte_at: FirstByteAt) -> None:
        self.calls.append(call_id)
        self.first_bytes.append(first_byte_at)
        self._asked.fire()
        await self.gate.wait()

    async def announced(self, count: int) -> list[FirstByteAt]:
        """Wait until so many calls were announced."""
        while len(self.first_bytes) < count:
            await self._asked.wait()
        return self.first_bytes


class CheckpointFor:
    """The runtime's way to a checkpoint that the agent asks for: counts, can hold, and gives what it is told to."""

    def __init__(self) -> None:
        self.calls: list[CallId] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()
        self.outcome: Checkpoint | SandboxFailed | None = None

    async def __call__(self, call: Call) -> Checkpoint | None:
        self.calls.append(call.call_id)
        self.asked.set()
        await self.gate.wait()
        if isinstance(self.outcome, SandboxFailed):
            raise self.outcome
        return self.outcome


async def make_row(database: WatchedDatabase, call: Call, body: SpawnBody, _point: Checkpoint) -> SessionId:
    """The row of a session that nobody has run: its workspace is no matter of the gateway's."""
    child_id = child_id_of(call)
    row = {"session_id": child_id, "name": body.name, "spec": {}, "wall_ns": CLOCK.wall_ns()}
    with suppress(NotFound):
        return (await database.read(lambda tx: sessions.get(tx, child_id))).session_id
    await database.write(lambda tx: sessions.create(tx, **row), durable=True)
    return child_id


@dataclass(slots=True)
class Stage:
    model: ModelServer
    directory: Path
    address: str
    session_id: SessionId
    upstreams: tuple[Upstream, ...]
    process: subprocess.Popen[bytes]
    prices: tuple[PriceRule, ...] = ()
    on_call: OnCall = field(default_factory=OnCall)
    checkpoint_for: CheckpointFor = field(default_factory=CheckpointFor)
    store: Path | None = None
    """Another place for the large bodies than beside the database."""
    log: Path | None = None
    """Another directory of the database than the sandbox's: that of the session from which this one was forked."""

    @property
    def blobs(self) -> LocalDirectory:
        """Where large bodies of the log lie."""
        return LocalDirectory(self.store or self.directory / "store")

    async def open_database(self) -> Database:
        log = self.log or self.directory
        return await open_database(f"sqlite://{log / 'torpor.db'}", clock=CLOCK, blobs=self.blobs)

    @property
    def url(self) -> str:
        return f"http://{self.address}:{GATEWAY_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """A client's environment inside the sandbox."""
        inside = {name: value.replace("127.0.0.1", self.address) for name, value in guest_environment().items()}
        return {"PATH": os.environ["PATH"], "HOME": str(self.directory), **inside}

    async def spawn(self, program: str) -> asyncio.subprocess.Process:
        """A Python client as a process of its own."""
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment,
        )

    async def output(self, program: str) -> str:
        process = await self.spawn(program)
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
    async def node(
        self,
        *,
        incarnation: int = 1,
        redo: RedoSet | None = None,
        cut: Mapping[StreamId, OpenCall] | None = None,
        crossroads: Crossroads | None = None,
        clock: Clock = CLOCK,
        on_wait: OnWait = print,
    ) -> AsyncGenerator[Node]:
        """A node that takes the session, adopts the sandbox, and dies without a word at the end."""
        database = WatchedDatabase(await self.open_database())
        try:
            token = await self.acquire(database)
            gateway = Gateway(
                database=database,
                session_id=self.session_id,
                owner_token=token,
                clock=clock,
                upstreams=self.upstreams,
                on_call=self.on_call,
                checkpoint_for=self.checkpoint_for,
                spawn_for=partial(make_row, database),
                on_wait=on_wait,
                crossroads=crossroads,
                prices=self.prices,
            )
            async with asyncio.TaskGroup() as group:
                group.create_task(gateway.run())
                await gateway.recover()
                node = Node(gateway, database, self.session_id, token, self.directory, group)
                try:
                    await node.live(incarnation, redo, cut)
                    yield node
                finally:
                    gateway.close()
                    for life in node.lives:
                        await life.end()
        finally:
            await database.close()

    async def acquire(self, database: Database) -> int:
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

    @asynccontextmanager
    async def fork(self, name: str) -> AsyncGenerator["Stage"]:
        """A session forked from this one as it is now, with a sandbox of its own."""
        session_id, directory, address = new_session_id(CLOCK.wall_ns()), self.directory / name, free_address()
        directory.mkdir()

        def create(tx: Transaction) -> None:
            parent = sessions.Parent(session_id=self.session_id, seq=sessions.get(tx, self.session_id).head_seq)
            sessions.create(tx, session_id=session_id, name=name, spec={}, parent=parent, wall_ns=CLOCK.wall_ns())

        database = await self.open_database()
        await database.write(create, durable=True)
        await database.close()
        process, log = start_init(directory, address), self.log or self.directory
        try:
            yield replace(self, directory=directory, address=address, session_id=session_id, process=process, log=log)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def reboot(self) -> None:
        """Another sandbox in place of the one that dies now."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process = start_init(self.directory, self.address)


@asynccontextmanager
async def gateway_stage(
    directory: Path,
    *,
    script: Script = plain,
    key: str = REAL_KEY,
    read_seconds: float = 60.0,
    retries: int = 0,
    budget: str | None = None,
) -> AsyncGenerator[Stage]:
    """A stage whose upstreams are one scripted model; with `retries`, refusals are sent again."""
    limit = None if budget is None else parse_dollars(budget)
    subprocess.run(["make", "-s", "-C", str(INIT_SOURCE)], check=True)
    async with serve_model(script=script, key=key) as model:
        upstreams = tuple(
            Upstream(
                name=family,
                family=family,
                base_url=f"{model.url}/v1" if family == "openai" else model.url,
                key=KeySource(value=Secret(key)),
                bearer=family == "openai",
                read_seconds=read_seconds,
                retries=retries,
            )
            for family in FAMILIES
        )
        session_id = new_session_id(CLOCK.wall_ns())
        database = await open_database(f"sqlite://{directory / 'torpor.db'}", clock=CLOCK)
        await database.write(
            lambda tx: sessions.create(
                tx, session_id=session_id, name=None, spec={}, wall_ns=CLOCK.wall_ns(), budget_nanousd=limit
            ),
            durable=True,
        )
        await database.close()
        address = free_address()
        stage = Stage(
            model=model,
            directory=directory,
            address=address,
            session_id=session_id,
            upstreams=upstreams,
            process=start_init(directory, address),
            prices=(PRICE,),
        )
        try:
            yield stage
        finally:
            stage.process.send_signal(signal.SIGKILL)
            stage.process.wait()


def start_init(directory: Path, address: str) -> subprocess.Popen[bytes]:
    fifos = {"to_guest": directory / "to_guest", "from_guest": directory / "from_guest"}
    for path in fifos.values():
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
    arguments = [str(INIT_SOURCE / "build" / "torpor-init"), "--run-dir", str(directory / "run")]
    for port in (GATEWAY_PORT, PROXY_PORT):
        arguments += ["--listen", f"{address}:{port}"]
    stdin, stdout = open_guest_ends(**fifos)
    try:
        return subprocess.Popen(arguments, stdin=stdin, stdout=stdout)
    finally:
        os.close(stdin)
        os.close(stdout)


def with_usage_asked(body: bytes) -> bytes:
    """A streaming chat request as the provider gets it whose client asked for no token counts."""
    return body.replace(b"{", b'{"stream_options":{"include_usage":true},', 1)


def http_request(path: str, body: bytes, headers: Mapping[str, str] | None = None, method: str = "POST") -> bytes:
    fields = {"host": "gateway", "content-type": "application/json", "content-length": str(len(body))}
    fields |= headers or {}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
