"""Claims of torpor.sandbox.link against the real torpor-init, run natively; the test is the agent."""

import asyncio
import fcntl
import os
import random
import signal
import socket
import struct
import termios
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from tests.integration.guests import NativeInit, build_init, native_init, running

from torpor.core.clock import SystemClock
from torpor.core.errors import InvalidInput, SandboxFailed
from torpor.sandbox.frames import AgentSpec, Closed, GuestStatus, Phase, StreamStatus
from torpor.sandbox.link import Link
from torpor.sandbox.streams import WINDOW_BYTES, Stream, StreamGone

ENTROPY = bytes(range(64))
LARGE_BYTES = 5_000_000


@pytest.fixture(scope="session")
def program() -> Path:
    return build_init()


@pytest.fixture
def init(program: Path, tmp_path: Path) -> Iterator[NativeInit]:
    with native_init(program, tmp_path) as init:
        yield init


async def open_link(init: NativeInit) -> Link:
    return await Link.open(
        to_guest=init.fifos.to_guest,
        from_guest=init.fifos.from_guest,
        clock=SystemClock(),
        deadline_seconds=10,
    )


async def start(link: Link, *arguments: str) -> None:
    spec = AgentSpec(arguments=arguments, cwd="/", environment={"PATH": os.environ["PATH"], "WORD": "hello"})
    await link.start(spec, incarnation=1, wall_ns=SystemClock().wall_ns(), entropy=ENTROPY)


def large(seed: int) -> bytes:
    return random.Random(seed).randbytes(LARGE_BYTES)


async def receive_all(stream: Stream) -> bytes:
    data = bytearray()
    while piece := await stream.receive():
        data += piece
        stream.acknowledge(stream.received)
    return bytes(data)


async def receive_bytes(stream: Stream, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        data += await stream.receive()
    return bytes(data)


async def request(init: NativeInit, body: bytes) -> bytes:
    """One client: sends, half-closes, reads to the end, closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", init.port)
    writer.write(body)
    writer.write_eof()
    answer = await reader.read(-1)
    writer.close()
    await writer.wait_closed()
    return answer


async def no_streams_left(link: Link) -> None:
    """Ask the guest again and again: it must forget a stream soon after the host did."""
    while (await link.cut(10)).streams:
        link.release()
    link.release()


def of(status: GuestStatus, stream: Stream) -> StreamStatus:
    return next(one for one in status.streams if one.stream == stream.id)


async def test_a_fresh_init_waits_for_its_agent(init: NativeInit) -> None:
    async with running(await open_link(init)) as link:
        assert link.status.phase is Phase.WAITING
        assert link.status.streams == ()
        assert link.status.next_stream == 16


async def test_an_agent_starts_and_its_output_arrives(init: NativeInit) -> None:
    async with running(await open_link(init)) as link:
        await start(link, "sh", "-c", "echo $WORD; echo pain >&2; pwd; exit 3")
        assert await receive_all(link.stdout) == b"hello\n/\n"
        assert await receive_all(link.stderr) == b"pain\n"
        assert os.waitstatus_to_exitcode(await link.wait_exit()) == 3
    assert (init.run_dir / "incarnation").read_text() == "1\n"
    assert (init.run_dir / "entropy").read_bytes() == ENTROPY


async def test_large_output_arrives_whole(init: NativeInit) -> None:
    async with running(await open_link(init)) as link:
        await start(link, "sh", "-c", f"head -c {LARGE_BYTES} /dev/zero; echo end")
        assert await receive_all(link.stdout) == bytes(LARGE_BYTES) + b"end\n"


async def test_a_command_that_is_missing_is_the_callers_error(init: NativeInit) -> None:
    async with running(await open_link(init)) as link:
        with pytest.raises(InvalidInput, match="no such command") as refused:
            await start(link, "no-such-command-anywhere")
        assert refused.value.code == "agent_cannot_start"
        assert refused.value.hint
        await start(link, "true")
        assert await link.wait_exit() == 0


async def test_a_long_spec_passes(init: NativeInit) -> None:
    async with running(await open_link(init)) as link:
        words = ["x" * 100_000 for _ in range(10)]
        await start(link, "sh", "-c", "echo $#", "sh", *words)
        assert await receive_all(link.stdout) == b"10\n"


async def test_a_request_and_its_response_are_whole_both_ways(init: NativeInit) -> None:
    async with running(await open_link(init)) as link, asyncio.TaskGroup() as group:
        client = group.create_task(request(init, large(1)))
        stream = await link.accept()
        assert (stream.id, stream.port, stream.kind) == (16, init.port, "call")
        assert await receive_all(stream) == large(1)
        assert stream.half_closed
        await stream.send(0, large(2))
        await stream.finish(LARGE_BYTES)
        assert await client == large(2)
        assert await stream.wait_closed() is Closed.CONSUMED
        stream.forget()
        assert (await link.cut(10)).streams == ()


async def test_two_hundred_clients_at_once_are_served_in_order(init: NativeInit) -> None:
    async def serve(stream: Stream) -> None:
        body = await receive_all(stream)
        await stream.send(0, body * 2)
        await stream.finish(2 * len(body))
        assert await stream.wait_closed() is Closed.CONSUMED
        stream.forget()

    async def ask(number: int) -> None:
        body = b"%d," % number * 5000
        assert await request(init, body) == body * 2

    async with running(await open_link(init)) as link, asyncio.TaskGroup() as group:
        # Twice, so that numbers and places in init's table no longer agree.
        for _ in range(2):
            clients = [group.create_task(ask(number)) for number in range(200)]
            streams = [await link.accept() for _ in clients]
            assert [stream.id for stream in streams] == sorted(stream.id for stream in streams)
            for stream in streams:
                group.create_task(serve(stream))
            await asyncio.gather(*clients)


async def test_connections_that_come_all_at_once_open_in_order(init: NativeInit) -> None:
    clients: list[socket.socket] = []
    async with running(await open_link(init)) as link:
        for _ in range(4):
            os.kill(init.process.pid, signal.SIGSTOP)
            clients += [socket.create_connection(("127.0.0.1", init.port)) for _ in range(60)]
            os.kill(init.process.pid, signal.SIGCONT)
            for _ in range(60):
                await link.accept()
    for client in clients:
        client.close()


async def test_more_connections_than_streams_wait_for_their_turn(init: NativeInit) -> None:
    async with running(await open_link(init)) as link, asyncio.TaskGroup() as group:
        clients = [group.create_task(request(init, b"please")) for _ in range(300)]
        streams = [await link.accept() for _ in range(256)]
        assert len((await link.cut(10)).streams) == 256
        link.release()
        for _ in range(300):
            stream = streams.pop(0)
            await stream.finish(0)
            await stream.wait_closed()
            stream.forget()
            if len(streams) + stream.id - 15 < 300:
                streams.append(await link.accept())
        assert [await client for client in clients] == [b""] * 300


async def gone(using: Awaitable[object]) -> None:
    with pytest.raises(StreamGone):
        await using


async def refused(client: Awaitable[object]) -> None:
    with pytest.raises(ConnectionResetError):
        await client


async def test_a_client_that_does_not_read_stops_the_sender_at_the_window(init: NativeInit) -> None:
    async with running(await open_link(init)) as link, asyncio.TaskGroup() as group:
        _reader, writer = await asyncio.open_connection("127.0.0.1", init.port, limit=1000)
        writer.write(b"x")
        stream = await link.accept()
        sending = group.create_task(gone(stream.send(0, bytes(20_000_000))))
        await at_rest(link, stream, lambda status: status.taken == status.written + WINDOW_BYTES)
        assert not sending.done()
        writer.transport.abort()
        assert await stream.wait_closed() is Closed.GONE
        await gone(stream.send(stream.sent, b"x"))


async def at_rest(link: Link, stream: Stream, full: Callable[[StreamStatus], bool]) -> None:
    """Wait until the stream is as full as it gets, at twenty looks in a row."""
    looks = 0
    while looks < 20:
        looks = looks + 1 if full(await looked_at(link, stream)) else 0


async def looked_at(link: Link, stream: Stream) -> StreamStatus:
    status = of(await link.cut(10), stream)
    link.release()
    await asyncio.sleep(0)  # The other tasks' turn.
    return status


async def test_an_owner_that_does_not_receive_stops_the_client_at_the_credit(init: NativeInit) -> None:
    async with running(await open_link(init)) as link, asyncio.TaskGroup() as group:
        client = group.create_task(request(init, large(3)))
        stream = await link.accept()
        await at_rest(link, stream, lambda status: status.sent == status.read == WINDOW_BYTES)
        assert stream.received == WINDOW_BYTES
        assert not client.done()
        assert await receive_all(stream) == large(3)
        await stream.finish(0)


def bytes_in(fifo: Path) -> int:
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, b"    "))[0]
    finally:
        os.close(descriptor)


async def test_at_a_cut_both_fifos_are_empty_and_positions_agree(init: NativeInit) -> None:
    async with running(await open_link(init)) as link, asyncio.TaskGroup() as group:
        clients = [group.create_task(request(init, large(seed))) for seed in (1, 2)]
        uploading, downloading = await link.accept(), await link.accept()
        upload = group.create_task(receive_all(uploading))
        received = await receive_all(downloading)
        sending = group.create_task(downloading.send(0, received))
        cuts_in_motion = 0
        while not sending.done():
            status = await link.cut(10)
            assert bytes_in(init.fifos.to_guest) == bytes_in(init.fifos.from_guest) == 0
            assert of(status, uploading).sent == uploading.received
            assert of(status, downloading).taken == downloading.sent
            cuts_in_motion += 0 < downloading.sent < LARGE_BYTES
            await asyncio.sleep(0)
            assert bytes_in(init.fifos.to_guest) == bytes_in(init.fifos.from_guest) == 0
            link.release()
            await asyncio.sleep(0)  # The sender's turn.
        assert cuts_in_motion > 2
        await downloading.finish(LARGE_BYTES)
        await uploading.finish(0)
        assert {await upload, received} == {large(1), large(2)}
        assert {await client for client in clients} == {b"", received}


@pytest.mark.parametrize("acknowledged_part", [0, 0.5, 1])
async def test_adoption_in_a_request_loses_and_doubles_nothing(init: NativeInit, acknowledged_part: float) -> None:
    async with asyncio.TaskGroup() as group:
        async with running(await open_link(init)) as dying:
            client = group.create_task(request(init, large(1)))
            stream = await dying.accept()
            kept = await receive_bytes(stream, 1_000_000)
            acknowledged = int(len(kept) * acknowledged_part)
            stream.acknowledge(acknowledged)
        async with running(await open_link(init)) as link:
            inherited = link.inherit(stream.id, position=len(kept), acknowledged=acknowledged)
            assert kept + await receive_all(inherited) == large(1)
            await inherited.send(0, b"thanks")
            await inherited.finish(6)
            assert await client == b"thanks"
            assert await inherited.wait_closed() is Closed.CONSUMED


async def test_adoption_in_a_response_loses_and_doubles_nothing(init: NativeInit) -> None:
    async with asyncio.TaskGroup() as group:
        async with running(await open_link(init)) as dying:
            client = group.create_task(request(init, b"please"))
            stream = await dying.accept()
            assert await receive_all(stream) == b"please"
            await stream.send(0, large(2)[:1_234_567])
        async with running(await open_link(init)) as link:
            status = of(link.status, stream)
            assert (status.half_closed, status.fin_received, status.read) == (True, False, 6)
            inherited = link.inherit(stream.id, position=6, acknowledged=6)
            assert 0 < inherited.taken <= 1_234_567
            assert await inherited.receive() == b""
            await inherited.send(0, large(2))
            await inherited.finish(LARGE_BYTES)
            assert await client == large(2)
            assert await inherited.wait_closed() is Closed.CONSUMED


async def test_adoption_after_adoption_amid_traffic(init: NativeInit) -> None:
    """Twenty nodes die in turn, each at some moment of an upload and a download."""
    chance = random.Random(7)
    kept, asked = bytearray(), large(1)
    async with asyncio.TaskGroup() as group:
        async with running(await open_link(init)) as link:
            client = group.create_task(request(init, asked))
            number = (await link.accept()).id
        for _ in range(20):
            async with running(await open_link(init)) as link:
                stream = link.inherit(number, position=len(kept), acknowledged=chance.randint(0, len(kept)))
                for _ in range(chance.randint(0, 3)):
                    if piece := await stream.receive():
                        kept += piece
                await stream.send(0, large(2)[: chance.randint(0, 300_000) + stream.sent])
        async with running(await open_link(init)) as link:
            stream = link.inherit(number, position=len(kept), acknowledged=len(kept))
            kept += await receive_all(stream)
            await stream.send(0, large(2))
            await stream.finish(LARGE_BYTES)
            assert await client == large(2)
    assert kept == asked


async def test_adoption_keeps_how_a_stream_ended(init: NativeInit) -> None:
    async with asyncio.TaskGroup() as group, running(await open_link(init)) as dying:
        client = group.create_task(request(init, b"please"))
        stream = await dying.accept()
        assert await receive_all(stream) == b"please"
        await stream.finish(0)
        await client
        stream.acknowledge(6)
        assert await stream.wait_closed() is Closed.CONSUMED
    for _ in range(2):
        async with running(await open_link(init)) as link:
            inherited = link.inherit(stream.id, position=6, acknowledged=6)
            assert await inherited.wait_closed() is Closed.CONSUMED
    async with running(await open_link(init)) as link:
        link.inherit(stream.id, position=6, acknowledged=6).forget()
        await no_streams_left(link)


async def test_a_refused_stream_is_reset_after_adoption(init: NativeInit) -> None:
    async with asyncio.TaskGroup() as group:
        async with running(await open_link(init)) as dying:
            client = group.create_task(refused(request(init, b"please")))
            stream = await dying.accept()
        async with running(await open_link(init)) as link:
            link.refuse(stream.id)
            await client
            await no_streams_left(link)


async def test_a_reset_is_seen_as_one(init: NativeInit) -> None:
    async with running(await open_link(init)) as link:
        reader, writer = await asyncio.open_connection("127.0.0.1", init.port)
        stream = await link.accept()
        await stream.send(0, b"half an answ")
        assert await reader.readexactly(12) == b"half an answ"
        stream.reset()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        assert await stream.wait_closed() is Closed.RESET
        stream.forget()
        await no_streams_left(link)


@pytest.mark.parametrize("half_closed", [False, True])
async def test_a_client_that_breaks_off_in_its_request_is_gone(init: NativeInit, half_closed: bool) -> None:
    async with running(await open_link(init)) as link:
        _reader, writer = await asyncio.open_connection("127.0.0.1", init.port)
        writer.write(bytes(1_000_000))
        if half_closed:
            writer.write_eof()
        stream = await link.accept()
        await stream.receive()
        client: socket.socket = writer.get_extra_info("socket")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        assert await stream.wait_closed() is Closed.GONE
        stream.forget()
        assert (await link.cut(10)).streams == ()


async def test_a_client_that_leaves_before_the_answer_has_not_consumed_it(init: NativeInit) -> None:
    async with running(await open_link(init)) as link:
        client = socket.create_connection(("127.0.0.1", init.port))
        client.sendall(b"please")
        stream = await link.accept()
        assert await stream.receive() == b"please"
        client.close()
        assert await stream.receive() == b""
        await stream.send(0, bytes(100_000))
        await stream.finish(100_000)
        assert await stream.wait_closed() is Closed.GONE


async def test_the_exit_is_kept_until_it_is_acknowledged(init: NativeInit) -> None:
    async with running(await open_link(init)) as dying:
        await start(dying, "sh", "-c", "echo last words; exit 7")
        status = await dying.wait_exit()
    async with running(await open_link(init)) as link:
        assert link.status.phase is Phase.EXITED
        assert link.status.wait_status == status
        assert await link.wait_exit() == status
        stdout = link.inherit(1, position=0, acknowledged=0)
        assert link.stdout is stdout
        assert await receive_all(stdout) == b"last words\n"
    link = await open_link(init)
    async with asyncio.TaskGroup() as group:
        group.create_task(link.run())
        assert os.waitstatus_to_exitcode(await link.wait_exit()) == 7
        link.acknowledge_exit()
    assert init.process.wait(10) == 0


async def test_output_is_kept_over_an_adoption(init: NativeInit) -> None:
    async with running(await open_link(init)) as dying:
        await start(dying, "sh", "-c", "seq 1 200000; exec sleep 1000")
        kept = await receive_bytes(dying.stdout, 300_000)
        dying.stdout.acknowledge(100_000)
    whole = "".join(f"{number}\n" for number in range(1, 200_001)).encode()
    async with running(await open_link(init)) as link:
        stdout = link.inherit(1, position=len(kept), acknowledged=200_000)
        rest = bytearray()
        while len(kept) + len(rest) < len(whole):
            rest += await stdout.receive()
            stdout.acknowledge(stdout.received)
        assert kept + rest == whole


async def test_a_signal_reaches_the_agent_once_for_each_request(init: NativeInit) -> None:
    script = 'trap "echo got" USR1; echo ready; while :; do read x < /dev/zero & wait $!; done'
    async with running(await open_link(init)) as link:
        await start(link, "bash", "-c", script)
        assert await receive_bytes(link.stdout, 6) == b"ready\n"
        await link.signal(signal.SIGUSR1, 1)
        assert await receive_bytes(link.stdout, 4) == b"got\n"
        await link.signal(signal.SIGUSR1, 1)
        await link.signal(signal.SIGKILL, 2)
        assert os.waitstatus_to_exitcode(await link.wait_exit()) == -signal.SIGKILL
        assert await receive_all(link.stdout) == b""


async def test_a_restored_guest_writes_its_life_down_and_runs_its_hooks(init: NativeInit) -> None:
    async with running(await open_link(init)) as link:
        await start(link, "sleep", "1000")
        hook = init.run_dir / "after-restore.d" / "10-note"
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(f"#!/bin/sh\necho $TORPOR_INCARNATION $TORPOR_SLEPT_NS > {init.run_dir}/note\n")
        hook.chmod(0o755)
    async with running(await open_link(init)) as link:
        for _ in range(2):
            await link.restored(
                incarnation=2,
                wall_ns=SystemClock().wall_ns(),
                slept_ns=5,
                entropy=ENTROPY[::-1],
                environment={"ZONE": "b"},
                deadline_seconds=20,
            )
        assert (init.run_dir / "note").read_text() == "2 5\n"
        assert (init.run_dir / "incarnation").read_text() == "2\n"
        assert (init.run_dir / "entropy").read_bytes() == ENTROPY[::-1]
        assert (init.run_dir / "environment").read_text() == "ZONE=b\n"


async def test_an_init_that_dies_is_link_lost(init: NativeInit) -> None:
    link = await open_link(init)
    init.process.kill()
    with pytest.raises(SandboxFailed) as failed:
        await link.run()
    assert failed.value.code == "link_lost"
