"""Guest ends for tests of the link, over real FIFOs: the real init, run natively, and one that lies."""

import asyncio
import os
import signal
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torpor.core.clock import Clock, SystemClock
from torpor.sandbox.fifos import Pulse, open_guest_ends
from torpor.sandbox.frames import Frame, FrameReader, FromGuest, ToGuest, encode
from torpor.sandbox.link import Link

INIT_SOURCE = Path(__file__).parents[2] / "native" / "init"


@dataclass(frozen=True)
class FifoPair:
    to_guest: Path
    from_guest: Path


def make_fifos(directory: Path) -> FifoPair:
    pair = FifoPair(to_guest=directory / "to_guest", from_guest=directory / "from_guest")
    os.mkfifo(pair.to_guest, 0o600)
    os.mkfifo(pair.from_guest, 0o600)
    return pair


@asynccontextmanager
async def running(link: Link) -> AsyncIterator[Link]:
    """The link with its `run`; closes it at the end."""
    async with asyncio.TaskGroup() as group:
        group.create_task(link.run())
        try:
            yield link
        finally:
            link.close()


@dataclass(frozen=True)
class NativeInit:
    """torpor-init as an ordinary process; `port` is its relay's, on this machine's loopback."""

    fifos: FifoPair
    port: int
    run_dir: Path
    process: subprocess.Popen[bytes]


def build_init() -> Path:
    subprocess.run(["make", "-s", "-C", str(INIT_SOURCE)], check=True)
    return INIT_SOURCE / "build" / "torpor-init"


@contextmanager
def native_init(program: Path, directory: Path, *options: str) -> Iterator[NativeInit]:
    fifos = make_fifos(directory)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [str(program), "--listen", f"127.0.0.1:{port}", "--run-dir", str(directory / "run"), *options]
    stdin, stdout = open_guest_ends(to_guest=fifos.to_guest, from_guest=fifos.from_guest)
    try:
        process = subprocess.Popen(arguments, stdin=stdin, stdout=stdout)
    finally:
        os.close(stdin)
        os.close(stdout)
    try:
        yield NativeInit(fifos=fifos, port=port, run_dir=directory / "run", process=process)
    finally:
        with suppress(FileNotFoundError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
        process.kill()
        process.wait()


def status_record(
    *streams: tuple[int, ...], version: int = 1, phase: int = 1, next_stream: int = 16, wait_status: int = 0
) -> bytes:
    """Streams are (stream, port, class, flags, R, A, V, W, sent)."""
    head = struct.pack("<IIQiIQQQII", version, phase, 3, wait_status, 7, next_stream, 0, 0, 0, len(streams))
    return head + b"".join(struct.pack("<IHBBQQQQQ", *stream) for stream in streams)


class HostileGuest:
    """Reads the host's frames one by one and sends what it is told to."""

    def __init__(self, fifos: FifoPair) -> None:
        self._stdin, self._stdout = open_guest_ends(to_guest=fifos.to_guest, from_guest=fifos.from_guest)
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._stdout, False)
        self._reader = FrameReader(None)
        self._frames: list[Frame] = []
        self.nonce = bytes(8)

    async def greet(self, status: bytes | None = None) -> None:
        self.nonce = (await self.expect(ToGuest.HELLO)).nonce
        await self.say(FromGuest.STATUS, arg=1, payload=status_record() if status is None else status)

    async def say(self, kind: int, stream: int = 0, arg: int = 0, payload: bytes = b"") -> None:
        await self.write(encode(Frame(nonce=self.nonce, type=kind, stream=stream, arg=arg, payload=payload)))

    async def write(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        while data:
            try:
                data = data[os.write(self._stdout, data) :]
            except BlockingIOError:
                await self._wait(loop.add_writer, self._stdout)
                loop.remove_writer(self._stdout)

    async def expect(self, kind: ToGuest) -> Frame:
        """The next frame of the host, which is to be of this kind; PINGs don't count."""
        loop = asyncio.get_running_loop()
        while True:
            while self._frames:
                frame = self._frames.pop(0)
                if frame.type != ToGuest.PING or kind is ToGuest.PING:
                    assert frame.type == kind, f"{frame} instead of {kind.name}"
                    return frame
            await self._wait(loop.add_reader, self._stdin)
            loop.remove_reader(self._stdin)
            self._frames += self._reader.feed(os.read(self._stdin, 65_536))

    def unread(self, *, pings: bool = False) -> list[Frame]:
        """What the host sent and nobody expected."""
        with suppress(BlockingIOError):
            self._frames += self._reader.feed(os.read(self._stdin, 65_536))
        return [frame for frame in self._frames if pings or frame.type != ToGuest.PING]

    @staticmethod
    async def _wait(watch, descriptor: int) -> None:
        ready = asyncio.Event()
        watch(descriptor, ready.set)
        await ready.wait()

    def hang_up(self) -> None:
        loop = asyncio.get_running_loop()
        for descriptor in (self._stdin, self._stdout):
            if descriptor >= 0:
                loop.remove_reader(descriptor)
                loop.remove_writer(descriptor)
                os.close(descriptor)
        self._stdin = self._stdout = -1


class SteppingClock(SystemClock):
    """Steps whenever it is looked at; a test can wait for a number of looks."""

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._looks = 0
        self._looked = Pulse()

    def monotonic(self) -> float:
        self._looks += 1
        self._looked.fire()
        return self._looks * self._step_seconds

    async def looked_at(self, times: int) -> None:
        goal = self._looks + times
        while self._looks < goal:
            await self._looked.wait()


async def open_link(
    fifos: FifoPair,
    guest: HostileGuest,
    status: bytes | None = None,
    *,
    clock: Clock | None = None,
    heartbeat_seconds: float = 5,
    silence_seconds: float = 30,
) -> Link:
    """A link that this guest greeted; its `run` is the test's to run."""
    async with asyncio.TaskGroup() as group:
        opening = group.create_task(
            Link.open(
                to_guest=fifos.to_guest,
                from_guest=fifos.from_guest,
                clock=clock or SystemClock(),
                heartbeat_seconds=heartbeat_seconds,
                silence_seconds=silence_seconds,
            )
        )
        await guest.greet(status)
    return opening.result()
