"""A small, synchronous host end of the init protocol, and torpor-init as an ordinary process under it.

Written from docs/init-protocol.md alone: it checks native/init and shares nothing with `torpor.sandbox`.
Everything waits on frames, sockets or the process; nothing sleeps.
"""

import os
import random
import re
import select
import socket
import struct
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import google_crc32c
from cobs import cobs

NATIVE = Path(__file__).resolve().parents[2] / "native" / "init"
PROGRAMS = {"plain": ("all", "torpor-init"), "sanitized": ("sanitize", "torpor-init-asan")}
WAIT_SECONDS = 15.0
WINDOW = 262_144
PAYLOAD_BYTES_MAX = 32768

HELLO, SPEC, START, RESTORED, DATA, FIN, RESET, ACK, CREDIT, RESUME = range(0x01, 0x0B)
BARRIER, RELEASE, PING, SIGNAL, EXIT_ACK, FORGET = range(0x0B, 0x11)
STATUS, OPEN, G_DATA, G_FIN, CLOSED, TAKEN, BARRIER_ACK, ALIVE, EXIT, PONG, LOG, STARTED = range(0x81, 0x8D)

CONSUMED, GONE, RESET_BY_HOST = 1, 2, 3
HALF_CLOSED, CLIENT_GONE, HOST_FIN, NOT_RESUMABLE, HAS_CONSUMED, WAS_RESET = 1, 2, 4, 8, 16, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    nonce: int
    type: int
    stream: int
    arg: int
    payload: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStatus:
    stream: int
    port: int
    output: bool
    flags: int
    read: int
    acked: int
    taken: int
    accepted: int
    sent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    version: int
    phase: int
    incarnation: int
    wait_status: int
    agent_pid: int
    next_stream: int
    last_signal_id: int
    dropped_frames: int
    start_errno: int
    streams: dict[int, StreamStatus]


def encode(nonce: int, kind: int, stream: int = 0, arg: int = 0, payload: bytes = b"") -> bytes:
    raw = struct.pack("<QB3xIQ", nonce, kind, stream, arg) + payload
    return cobs.encode(raw + struct.pack("<I", google_crc32c.value(raw))) + b"\0"


def decode(wire: bytes) -> Frame | None:
    try:
        raw = cobs.decode(wire)
    except cobs.DecodeError:
        return None
    if len(raw) < 28 or google_crc32c.value(raw[:-4]) != struct.unpack("<I", raw[-4:])[0]:
        return None
    nonce, kind, stream, arg = struct.unpack("<QB3xIQ", raw[:24])
    return Frame(nonce=nonce, type=kind, stream=stream, arg=arg, payload=raw[24:-4])


def parse_status(record: bytes) -> Status:
    head = struct.unpack("<IIQiIQQQII", record[:56])
    assert len(record) == 56 + 48 * head[9]
    streams: dict[int, StreamStatus] = {}
    for at in range(56, len(record), 48):
        stream, port, kind, flags, read, acked, taken, accepted, sent = struct.unpack(
            "<IHBBQQQQQ", record[at : at + 48]
        )
        streams[stream] = StreamStatus(
            stream=stream, port=port, output=kind == 1, flags=flags,
            read=read, acked=acked, taken=taken, accepted=accepted, sent=sent,
        )  # fmt: skip
    return Status(
        version=head[0], phase=head[1], incarnation=head[2], wait_status=head[3], agent_pid=head[4],
        next_stream=head[5], last_signal_id=head[6], dropped_frames=head[7], start_errno=head[8],
        streams=streams,
    )  # fmt: skip


def spec(args: list[str], *, cwd: str = "/", env: dict[str, str] | None = None) -> bytes:
    environment = {"PATH": os.environ["PATH"]} if env is None else env
    strings = [
        cwd,
        str(len(args)),
        *args,
        str(len(environment)),
        *(f"{k}={v}" for k, v in environment.items()),
    ]
    return b"".join(s.encode() + b"\0" for s in strings)


@dataclass(slots=True, kw_only=True)
class Received:
    """What the host end holds of one stream."""

    data: bytearray = field(default_factory=bytearray)
    fin: int | None = None
    closed: Frame | None = None


@dataclass(slots=True, kw_only=True)
class Host:
    """One life of the host: its ends of both FIFOs, one nonce."""

    write_fd: int
    read_fd: int
    nonce: int
    partial: bytes = b""
    frames: list[Frame] = field(default_factory=list)
    foreign: int = 0
    streams: defaultdict[int, Received] = field(default_factory=lambda: defaultdict(Received))
    auto_ack: bool = False
    careless: bool = False
    """Reads nothing while it writes, and looks at no request bytes."""

    @classmethod
    def open(cls, to_guest: Path, from_guest: Path, nonce: int) -> Self:
        read_fd = os.open(from_guest, os.O_RDONLY | os.O_NONBLOCK)
        write_fd = os.open(to_guest, os.O_WRONLY | os.O_NONBLOCK)
        host = cls(write_fd=write_fd, read_fd=read_fd, nonce=nonce)
        host.write(b"\0")
        return host

    def close(self) -> None:
        """The host dies."""
        for fd in (self.write_fd, self.read_fd):
            with suppress(OSError):
                os.close(fd)
        self.write_fd = self.read_fd = -1

    def write(self, data: bytes) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while data:
            assert time.monotonic() < deadline, "init does not read"
            try:
                data = data[os.write(self.write_fd, data) :]
            except BlockingIOError:
                reads = [] if self.careless else [self.read_fd]
                if select.select(reads, [self.write_fd], [], 1)[0]:
                    self.read()

    def wire(self, kind: int, stream: int = 0, arg: int = 0, payload: bytes = b"") -> bytes:
        return encode(self.nonce, kind, stream, arg, payload)

    def send(self, kind: int, stream: int = 0, arg: int = 0, payload: bytes = b"") -> None:
        self.write(self.wire(kind, stream, arg, payload))

    def read(self) -> bool:
        """Takes in what is there; False at the end of the FIFO."""
        try:
            data = os.read(self.read_fd, 65536)
        except BlockingIOError:
            return True
        *wires, self.partial = (self.partial + data).split(b"\0")
        for wire in wires:
            frame = decode(wire) if wire else None
            if frame is None or frame.nonce != self.nonce:
                self.foreign += bool(wire)
            else:
                self.note(frame)
        return bool(data)

    def note(self, frame: Frame) -> None:
        self.frames.append(frame)
        if not frame.stream or self.careless:
            return
        received = self.streams[frame.stream]
        if frame.type == G_DATA:
            assert len(frame.payload) <= PAYLOAD_BYTES_MAX
            assert frame.arg == len(received.data), "a gap or a repetition in a request"
            received.data += frame.payload
            if self.auto_ack:
                self.ack(frame.stream, len(received.data))
        elif frame.type == G_FIN:
            received.fin = frame.arg
        elif frame.type == CLOSED:
            received.closed = frame

    def ack(self, stream: int, position: int) -> None:
        self.send(ACK, stream, position)
        self.send(CREDIT, stream, position + WINDOW)

    def wait(self, ready: Callable[[], bool], what: str, *, seconds: float = WAIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            left = deadline - time.monotonic()
            assert left > 0, f"no {what} within {seconds} s; frames: {self.frames[-5:]}"
            if select.select([self.read_fd], [], [], left)[0] and not self.read():
                msg = f"init left before {what}"
                raise EOFError(msg)

    def wait_any(self) -> None:
        """Takes in what comes, for a moment at most: the caller looks for itself what has changed."""
        if select.select([self.read_fd], [], [], 0.01)[0]:
            self.read()

    def wait_status(self, good: Callable[[Status], bool]) -> Status:
        """HELLO until the status is so."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not good(status := self.hello()):
            assert time.monotonic() < deadline, status
        return status

    def expect_silence(self, seconds: float) -> None:
        assert not select.select([self.read_fd], [], [], seconds)[0], "init said something"

    def drop_frames(self) -> None:
        """Reads without looking."""
        with suppress(BlockingIOError):
            while os.read(self.read_fd, 65536):
                pass

    def find(self, kind: int, stream: int | None = None) -> Frame | None:
        """The first frame of that kind, which is then taken out."""
        for at, frame in enumerate(self.frames):
            if frame.type == kind and stream in (None, frame.stream):
                return self.frames.pop(at)
        return None

    def expect(self, kind: int, stream: int | None = None, *, seconds: float = WAIT_SECONDS) -> Frame:
        found: list[Frame] = []

        def ready() -> bool:
            frame = self.find(kind, stream)
            if frame is not None:
                found.append(frame)
            return frame is not None

        self.wait(ready, f"frame {kind:#x} of stream {stream}", seconds=seconds)
        return found[0]

    def hello(self) -> Status:
        self.send(HELLO, 0, 1)
        return parse_status(self.expect(STATUS).payload)

    def ping(self, number: int = 1) -> None:
        """Returns when init has handled everything sent before, and what it said meanwhile was read."""
        self.send(PING, 0, number)
        self.wait(lambda: any(f.type == PONG and f.arg == number for f in self.frames), "PONG")
        self.expect(PONG)

    def send_spec(self, data: bytes) -> None:
        for at in range(0, len(data), PAYLOAD_BYTES_MAX):
            self.send(SPEC, 0, at, data[at : at + PAYLOAD_BYTES_MAX])

    def start(self, args: list[str], *, cwd: str = "/", env: dict[str, str] | None = None) -> Frame:
        data = spec(args, cwd=cwd, env=env)
        self.send_spec(data)
        self.send(START, 0, len(data), struct.pack("<QQ", 1, time.time_ns()) + bytes(range(64)))
        return self.expect(STARTED)

    def restored(self, incarnation: int, changes: bytes = b"", slept_ns: int = 7) -> None:
        payload = struct.pack("<QQ", time.time_ns(), slept_ns) + bytes(64) + changes
        self.send(RESTORED, 0, incarnation, payload)

    def data(self, stream: int, offset: int, data: bytes) -> None:
        for at in range(0, len(data), PAYLOAD_BYTES_MAX):
            self.send(DATA, stream, offset + at, data[at : at + PAYLOAD_BYTES_MAX])

    def request(self, stream: int, length: int) -> bytes:
        """Waits for that many bytes of a request in all."""
        self.wait(lambda: len(self.streams[stream].data) >= length, f"{length} bytes")
        return bytes(self.streams[stream].data)

    def adopt(self, status: Status, old: "Host") -> None:
        """What a node does after HELLO that has the streams of its predecessor in its log."""
        for number, stream in status.streams.items():
            before = old.streams[number]
            position = len(before.data)
            self.streams[number] = Received(data=bytearray(before.data), fin=before.fin)
            self.send(ACK, number, stream.acked)
            self.send(RESUME, number, position)
            self.send(CREDIT, number, position + WINDOW)


@dataclass(slots=True, kw_only=True)
class Guest:
    """torpor-init as a process, with its FIFOs and its directory."""

    process: subprocess.Popen[bytes]
    directory: Path
    nonce: int = 1000
    hosts: list[Host] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    def connect_host(self) -> Host:
        self.nonce += 1
        host = Host.open(self.directory / "to-guest", self.directory / "from-guest", self.nonce)
        self.hosts.append(host)
        return host

    def memory_kib(self) -> int:
        return self.status_kib("VmRSS")

    def status_kib(self, name: str) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+)", text)[1])

    def cpu_ticks(self) -> int:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])


Pair = tuple[Guest, Host]


def launch(binary: Path, directory: Path, *options: str, listen: int = 1) -> Guest:
    """Starts init on a FIFO pair whose host ends are open just long enough."""
    fifos = [directory / "to-guest", directory / "from-guest"]
    for fifo in fifos:
        os.mkfifo(fifo)
    holders = [os.open(fifo, os.O_RDWR) for fifo in fifos]
    ends = [os.open(fifos[0], os.O_RDONLY), os.open(fifos[1], os.O_WRONLY)]
    command = [
        str(binary),
        "--run-dir",
        str(directory / "run"),
        *["--listen", "127.0.0.1:0"] * listen,
        *options,
    ]
    with (directory / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, stdin=ends[0], stdout=ends[1], stderr=stderr)
    guest = Guest(process=process, directory=directory)
    guest.connect_host()
    for fd in (*holders, *ends):
        os.close(fd)
    return guest


@contextmanager
def running(binary: Path, directory: Path, *options: str, listen: int = 1) -> Iterator[Pair]:
    """A guest that has said HELLO and its ports. At the end it must have written nothing to stderr."""
    guest = launch(binary, directory, *options, listen=listen)
    host = guest.hosts[0]
    try:
        status = host.hello()
        assert (status.version, status.phase) == (1, 0)
        while len(guest.ports) < listen:
            guest.ports.append(int(host.expect(LOG).payload.rpartition(b":")[2]))
        yield guest, host
    finally:
        for each in guest.hosts:
            each.close()
        guest.process.kill()
        guest.process.wait()
        complaint = (directory / "stderr").read_text()
        assert not complaint, complaint


def build(kind: str) -> Path:
    """The program, "plain" or "sanitized", made if missing or old."""
    target, name = PROGRAMS[kind]
    subprocess.run(["make", "-s", "-C", str(NATIVE), target], check=True)
    return NATIVE / "build" / name


def connect(guest: Guest, port: int = 0) -> socket.socket:
    """A client in the agent's place."""
    client = socket.create_connection(("127.0.0.1", guest.ports[port]), timeout=WAIT_SECONDS)
    client.settimeout(WAIT_SECONDS)
    return client


def wait_until_gone(pid: int) -> None:
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            assert select.select([fd], [], [], WAIT_SECONDS)[0], f"process {pid} lives on"
        finally:
            os.close(fd)


def bytes_of(length: int) -> bytes:
    return random.Random(length).randbytes(length)


def read_all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


def send_in_background(client: socket.socket, data: bytes, host: Host) -> None:
    """Sends while the host reads: the client blocks whenever init does not take more."""
    client.setblocking(False)
    while data:
        try:
            data = data[client.send(data) :]
        except BlockingIOError:
            host.wait_any()
    client.setblocking(True)


def closing(host: Host, stream: int) -> tuple[int, int]:
    """How the stream closed, and W; afterwards both ends forget it."""
    frame = host.expect(CLOSED, stream)
    host.send(FORGET, stream)
    return frame.payload[0], frame.arg


def fill(host: Host, stream: int) -> int:
    """Sends zeros as the windows allow until the client's socket takes no more; returns V."""
    taken = accepted = 0
    while taken < accepted + WINDOW:
        host.data(stream, taken, bytes(accepted + WINDOW - taken))
        taken = accepted + WINDOW
        host.ping()
        accepted = max(f.arg for f in host.frames if f.type == TAKEN and f.stream == stream)
    return taken
