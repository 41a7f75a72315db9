"""Claims of torpor.sandbox.link against a guest that lies, floods, falls silent or dies."""

import asyncio
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.integration.guests import (
    FifoPair,
    HostileGuest,
    SteppingClock,
    make_fifos,
    open_link,
    running,
    status_record,
)

from torpor.core.clock import SystemClock
from torpor.core.errors import Conflict, InvalidInput, SandboxFailed
from torpor.sandbox.fifos import READ_BYTES, Pulse
from torpor.sandbox.frames import AgentSpec, Closed, FromGuest, ToGuest
from torpor.sandbox.link import Link
from torpor.sandbox.streams import WINDOW_BYTES, Stream, StreamGone

AGENT = AgentSpec(arguments=("agent",), cwd="/", environment={})
ENTROPY = bytes(64)


@pytest.fixture
def fifos(tmp_path: Path) -> FifoPair:
    return make_fifos(tmp_path)


@pytest.fixture
async def guest(fifos: FifoPair) -> AsyncIterator[HostileGuest]:
    guest = HostileGuest(fifos)
    yield guest
    guest.hang_up()


async def failure(link: Link) -> SandboxFailed:
    with pytest.raises(SandboxFailed) as failed:
        await link.run()
    return failed.value


def taken(position: int) -> bytes:
    return struct.pack("<Q", position)


LIES = {
    "a stream number that does not rise": [(FromGuest.OPEN, 20, 80), (FromGuest.OPEN, 19, 80)],
    "a stream that is open": [(FromGuest.OPEN, 20, 80), (FromGuest.OPEN, 20, 80)],
    "a stream of before the link": [(FromGuest.OPEN, 15, 80)],
    "a port that is none": [(FromGuest.OPEN, 16, 65_536)],
    "257 streams": [(FromGuest.OPEN, number, 80) for number in range(16, 16 + 257)],
    "data of a stream that is not open": [(FromGuest.DATA, 16, 0, b"x")],
    "data of output before the start": [(FromGuest.DATA, 1, 0, b"x")],
    "a gap": [(FromGuest.OPEN, 16, 80), (FromGuest.DATA, 16, 1, b"x")],
    "a repetition": [(FromGuest.OPEN, 16, 80), (FromGuest.DATA, 16, 0, b"xx"), (FromGuest.DATA, 16, 1, b"x")],
    "data beyond its credit": [
        (FromGuest.OPEN, 16, 80),
        *((FromGuest.DATA, 16, at, bytes(32_768)) for at in range(0, WINDOW_BYTES, 32_768)),
        (FromGuest.DATA, 16, WINDOW_BYTES, b"x"),
    ],
    "an end at another length": [(FromGuest.OPEN, 16, 80), (FromGuest.FIN, 16, 1)],
    "data after the end": [(FromGuest.OPEN, 16, 80), (FromGuest.FIN, 16, 0), (FromGuest.DATA, 16, 0, b"x")],
    "taking what was not sent": [(FromGuest.OPEN, 16, 80), (FromGuest.TAKEN, 16, 0, taken(1))],
    "writing more than it took": [(FromGuest.OPEN, 16, 80), (FromGuest.TAKEN, 16, 1, taken(0))],
    "positions of no length": [(FromGuest.OPEN, 16, 80), (FromGuest.TAKEN, 16, 0, b"")],
    "consuming an answer that has no end": [(FromGuest.OPEN, 16, 80), (FromGuest.CLOSED, 16, 0, b"\1")],
    "an unknown way of closing": [(FromGuest.OPEN, 16, 80), (FromGuest.CLOSED, 16, 0, b"\4")],
    "a close beyond what was sent": [(FromGuest.OPEN, 16, 80), (FromGuest.CLOSED, 16, 1, b"\2")],
    "a word after the close": [
        (FromGuest.OPEN, 16, 80),
        (FromGuest.CLOSED, 16, 0, b"\2"),
        (FromGuest.FIN, 16, 0),
    ],
    "an answer to no barrier": [(FromGuest.BARRIER_ACK, 0, 1, status_record())],
    "an exit status of no length": [(FromGuest.EXIT, 0, 0, b"")],
    "a second greeting": [(FromGuest.STATUS, 0, 1, status_record())],
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
async def test_a_lie_ends_the_link(fifos: FifoPair, guest: HostileGuest, lie: list[tuple]) -> None:
    link = await open_link(fifos, guest)
    async with asyncio.TaskGroup() as group:
        failing = group.create_task(failure(link))
        for frame in lie:
            await guest.say(*frame)
    assert failing.result().code == "link_protocol"
    with pytest.raises(SandboxFailed):
        await link.wait_exit()


@pytest.mark.parametrize("status", [b"", status_record(version=3), status_record((16, 1, 0, 0, 0, 1, 0, 0, 0))])
async def test_a_lie_in_the_status_ends_the_handshake(fifos: FifoPair, guest: HostileGuest, status: bytes) -> None:
    with pytest.raises(ExceptionGroup) as failed:
        await open_link(fifos, guest, status)
    assert failed.group_contains(SandboxFailed, match="cannot trust")


async def test_unknown_frames_and_noise_are_ignored(fifos: FifoPair, guest: HostileGuest) -> None:
    async with running(await open_link(fifos, guest)) as link:
        await guest.write(b"\0noise\0\0" + b"x" * 40_000 + b"\0")
        await guest.say(0xEE, 5, 6, b"of a later version")
        await guest.say(FromGuest.LOG, payload=b"a line\n\x1b[31m of text")
        await guest.say(FromGuest.OPEN, 16, 80)
        assert (await link.accept()).id == 16


async def test_a_guest_that_floods_and_does_not_read_costs_no_memory(
    fifos: FifoPair, guest: HostileGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    choke_bytes = 65_536
    monkeypatch.setattr("torpor.sandbox.fifos.CHOKE_BYTES", choke_bytes)
    link = await open_link(fifos, guest)
    queued = link._fifos
    owned, progress = 15, Pulse()

    async def own() -> None:
        nonlocal owned
        while True:
            stream = await link.accept()
            await stream.wait_closed()
            stream.forget()
            owned = stream.id
            progress.fire()

    async def flood() -> None:
        for number in range(16, 2**32):
            await guest.say(FromGuest.OPEN, number, 80)
            await guest.say(FromGuest.CLOSED, number, 0, b"\2")
            while number - owned > 200:
                await progress.wait()

    async with running(link), asyncio.TaskGroup() as group:
        busy = [group.create_task(own()), group.create_task(flood())]
        while queued._queued_bytes <= choke_bytes:
            await progress.wait()
        for _ in range(1000):
            await asyncio.sleep(0)
        assert queued._queued_bytes <= choke_bytes + READ_BYTES
        choked_at = owned
        while owned < choked_at + 1000:
            await guest.expect(ToGuest.FORGET)
        for task in busy:
            task.cancel()


async def test_a_dead_guest_is_link_lost(fifos: FifoPair, guest: HostileGuest) -> None:
    link = await open_link(fifos, guest)
    await guest.say(FromGuest.OPEN, 16, 80)
    async with asyncio.TaskGroup() as group:
        failing = group.create_task(failure(link))
        stream = await link.accept()
        guest.hang_up()
        with pytest.raises(StreamGone):
            await stream.receive()
    assert failing.result().code == "link_lost"
    with pytest.raises(SandboxFailed):
        await link.accept()
    with pytest.raises(StreamGone):
        await stream.send(0, b"x")


async def test_a_guest_that_never_comes_is_given_up_at_the_deadline(fifos: FifoPair) -> None:
    with pytest.raises(SandboxFailed) as failed:
        await Link.open(
            to_guest=fifos.to_guest, from_guest=fifos.from_guest, clock=SystemClock(), deadline_seconds=0.05
        )
    assert failed.value.code == "link_silent"


async def test_fifos_that_do_not_exist_are_link_lost(tmp_path: Path) -> None:
    with pytest.raises(SandboxFailed) as failed:
        await Link.open(to_guest=tmp_path / "no", from_guest=tmp_path / "no", clock=SystemClock())
    assert failed.value.code == "link_lost"


async def test_a_guest_that_comes_late_is_waited_for(fifos: FifoPair) -> None:
    async with asyncio.TaskGroup() as group:
        opening = group.create_task(
            Link.open(to_guest=fifos.to_guest, from_guest=fifos.from_guest, clock=SystemClock())
        )
        await asyncio.sleep(0)
        guest = HostileGuest(fifos)
        await guest.greet()
    opening.result().close()
    guest.hang_up()


async def test_silence_is_noticed(fifos: FifoPair, guest: HostileGuest) -> None:
    clock = SteppingClock(0.015)
    link = await open_link(fifos, guest, clock=clock, heartbeat_seconds=0.01, silence_seconds=0.1)
    assert (await failure(link)).code == "link_silent"
    assert (await guest.expect(ToGuest.PING)).type == ToGuest.PING


async def test_a_node_that_stood_still_does_not_call_the_guest_silent(fifos: FifoPair, guest: HostileGuest) -> None:
    clock = SteppingClock(3600)
    async with running(await open_link(fifos, guest, clock=clock, heartbeat_seconds=0.01)) as link:
        await clock.looked_at(20)
        await guest.say(FromGuest.OPEN, 16, 80)
        await link.accept()


async def test_silence_during_a_cut_is_no_silence(fifos: FifoPair, guest: HostileGuest) -> None:
    clock = SteppingClock(0.015)
    link = await open_link(fifos, guest, clock=clock, heartbeat_seconds=0.01, silence_seconds=0.1)
    async with running(link):
        async with asyncio.TaskGroup() as group:
            cutting = group.create_task(link.cut(10))
            barrier = await guest.expect(ToGuest.BARRIER)
            await guest.say(FromGuest.BARRIER_ACK, arg=barrier.arg, payload=status_record())
        assert cutting.result().next_stream == 16
        await clock.looked_at(20)
        assert guest.unread(pings=True) == []
        link.release()
        assert (await guest.expect(ToGuest.RELEASE)).arg == barrier.arg


async def answered_cut(link: Link, guest: HostileGuest, *streams: tuple[int, ...]) -> int:
    async with asyncio.TaskGroup() as group:
        group.create_task(link.cut(10))
        barrier = await guest.expect(ToGuest.BARRIER)
        await guest.say(FromGuest.BARRIER_ACK, arg=barrier.arg, payload=status_record(*streams, next_stream=100))
    return barrier.arg


async def test_a_frame_during_a_cut_ends_the_link(fifos: FifoPair, guest: HostileGuest) -> None:
    link = await open_link(fifos, guest)
    async with asyncio.TaskGroup() as group:
        failing = group.create_task(failure(link))
        await answered_cut(link, guest)
        await guest.say(FromGuest.PONG)
    assert failing.result().code == "link_protocol"


@pytest.mark.parametrize(
    "stream",
    [
        (16, 80, 0, 0, 9, 0, 0, 0, 4),  # handed over 4, the host has 3
        (16, 80, 0, 0, 9, 0, 6, 0, 3),  # took 6, the host sent 5
    ],
)
async def test_a_barrier_whose_positions_differ_ends_the_link(
    fifos: FifoPair, guest: HostileGuest, stream: tuple[int, ...]
) -> None:
    link = await open_link(fifos, guest)
    async with asyncio.TaskGroup() as group:
        failing = group.create_task(failure(link))
        await guest.say(FromGuest.OPEN, 16, 80)
        await guest.say(FromGuest.DATA, 16, 0, b"abc")
        accepted = await link.accept()
        await accepted.send(0, b"12345")
        await guest.expect(ToGuest.DATA)
        with pytest.raises(ExceptionGroup):
            await answered_cut(link, guest, stream)
    assert failing.result().code == "link_protocol"


async def test_nothing_is_sent_between_barrier_and_release(fifos: FifoPair, guest: HostileGuest) -> None:
    async with running(await open_link(fifos, guest)) as link, asyncio.TaskGroup() as group:
        await guest.say(FromGuest.OPEN, 16, 80)
        await guest.say(FromGuest.DATA, 16, 0, b"abc")
        stream = await link.accept()
        await answered_cut(link, guest, (16, 80, 0, 0, 3, 0, 0, 0, 3))
        stream.acknowledge(3)
        sending = group.create_task(stream.send(0, b"12345"))
        signalling = group.create_task(link.signal(10, 1))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not sending.done()
        assert not signalling.done()
        assert guest.unread() == []
        link.release()
        await guest.expect(ToGuest.RELEASE)
        assert (await guest.expect(ToGuest.ACK)).arg == 3
        assert (await guest.expect(ToGuest.DATA)).payload == b"12345"
        assert (await guest.expect(ToGuest.SIGNAL)).stream == 10


async def test_a_cut_that_is_cancelled_or_late_leaves_the_link_as_it_was(fifos: FifoPair, guest: HostileGuest) -> None:
    async with running(await open_link(fifos, guest)) as link:
        async with asyncio.TaskGroup() as group:
            cutting = group.create_task(link.cut(10))
            await guest.expect(ToGuest.BARRIER)
            cutting.cancel()
        assert (await guest.expect(ToGuest.RELEASE)).arg == 1
        with pytest.raises(SandboxFailed, match="did not answer"):
            await link.cut(0.02)
        await guest.expect(ToGuest.BARRIER)
        await guest.expect(ToGuest.RELEASE)
        for late in (1, 2):
            await guest.say(FromGuest.BARRIER_ACK, arg=late, payload=status_record())
        await guest.say(FromGuest.OPEN, 16, 80)
        await (await link.accept()).send(0, b"on it goes")
        assert (await guest.expect(ToGuest.DATA)).payload == b"on it goes"
        assert await answered_cut(link, guest) == 3


async def test_a_second_cut_waits_for_the_first(fifos: FifoPair, guest: HostileGuest) -> None:
    async with running(await open_link(fifos, guest)) as link, asyncio.TaskGroup() as group:
        await answered_cut(link, guest)
        group.create_task(link.cut(10))
        for _ in range(20):
            await asyncio.sleep(0)
        assert guest.unread() == []
        link.release()
        await guest.expect(ToGuest.RELEASE)
        barrier = await guest.expect(ToGuest.BARRIER)
        await guest.say(FromGuest.BARRIER_ACK, arg=barrier.arg, payload=status_record())


async def test_an_agent_that_cannot_start_says_why(fifos: FifoPair, guest: HostileGuest) -> None:
    async with running(await open_link(fifos, guest, status_record(phase=0))) as link:
        with pytest.raises(ExceptionGroup) as refused:
            async with asyncio.TaskGroup() as group:
                group.create_task(link.start(AGENT, incarnation=1, wall_ns=1, entropy=ENTROPY))
                await guest.expect(ToGuest.SPEC)
                await guest.expect(ToGuest.START)
                await guest.say(FromGuest.STARTED, arg=2, payload=b"exec\x1b agent")
        assert refused.group_contains(InvalidInput, match=r"no such command in the sandbox \(exec\? agent\)")


async def test_an_agent_is_started_once(fifos: FifoPair, guest: HostileGuest) -> None:
    async with running(await open_link(fifos, guest)) as link:
        with pytest.raises(Conflict):
            await link.start(AGENT, incarnation=1, wall_ns=1, entropy=ENTROPY)


async def test_nothing_is_delivered_before_the_restored_guest_is_alive(fifos: FifoPair, guest: HostileGuest) -> None:
    status = status_record((16, 80, 0, 1, 3, 0, 2, 1, 0), next_stream=17)
    async with running(await open_link(fifos, guest, status)) as link, asyncio.TaskGroup() as group:
        stream = link.inherit(16, position=0, acknowledged=0)
        assert [(await guest.expect(kind)).arg for kind in (ToGuest.ACK, ToGuest.RESUME, ToGuest.CREDIT)] == [
            0,
            0,
            WINDOW_BYTES,
        ]
        group.create_task(
            link.restored(
                incarnation=4,
                wall_ns=1,
                slept_ns=2,
                entropy=ENTROPY,
                environment={"A": "b"},
                deadline_seconds=5,
            )
        )
        assert (await guest.expect(ToGuest.RESTORED)).payload.endswith(b"A=b\0")
        group.create_task(stream.send(2, b"c"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert guest.unread() == []
        await guest.say(FromGuest.ALIVE, arg=4)
        assert (await guest.expect(ToGuest.DATA)).arg == 2


async def test_a_guest_that_forgot_what_it_read_is_not_adopted(fifos: FifoPair, guest: HostileGuest) -> None:
    status = status_record((16, 80, 0, 0, 3, 1, 0, 0, 1), (17, 80, 0, 0, 3, 1, 0, 0, 1), next_stream=18)
    link = await open_link(fifos, guest, status)
    with pytest.raises(SandboxFailed, match="forgot"):
        link.inherit(16, position=4, acknowledged=4)
    with pytest.raises(SandboxFailed, match="freed"):
        link.inherit(17, position=0, acknowledged=0)
    link.close()


async def test_a_window_bounds_what_is_sent_to_a_client_that_does_not_read(
    fifos: FifoPair, guest: HostileGuest
) -> None:
    async with running(await open_link(fifos, guest)) as link, asyncio.TaskGroup() as group:
        await guest.say(FromGuest.OPEN, 16, 80)
        stream = await link.accept()
        sending = group.create_task(stream.send(0, bytes(WINDOW_BYTES + 1)))
        got = 0
        while got < WINDOW_BYTES:
            got += len((await guest.expect(ToGuest.DATA)).payload)
        assert guest.unread() == []
        assert not sending.done()
        await guest.say(FromGuest.TAKEN, 16, 1, taken(WINDOW_BYTES))
        assert (await guest.expect(ToGuest.DATA)).arg == WINDOW_BYTES


async def test_credit_follows_what_the_owner_took(fifos: FifoPair, guest: HostileGuest) -> None:
    async with running(await open_link(fifos, guest)) as link:
        await guest.say(FromGuest.OPEN, 16, 80)
        await guest.say(FromGuest.DATA, 16, 0, bytes(32_768))
        await guest.say(FromGuest.DATA, 16, 32_768, bytes(32_768))
        await guest.say(FromGuest.OPEN, 17, 80)
        stream = await link.accept()
        await link.accept()
        assert guest.unread() == []
        assert len(await stream.receive()) == 65_536
        assert (await guest.expect(ToGuest.CREDIT)).arg == WINDOW_BYTES + 65_536


async def test_a_stream_that_was_reset_is_forgotten_whatever_it_says(fifos: FifoPair, guest: HostileGuest) -> None:
    async with running(await open_link(fifos, guest)) as link:
        await guest.say(FromGuest.OPEN, 16, 80)
        stream = await link.accept()
        stream.reset()
        await guest.expect(ToGuest.RESET)
        await guest.say(FromGuest.DATA, 16, 0, b"on its way")
        assert await stream.wait_closed() is Closed.RESET
        assert guest.unread() == []
        stream.forget()
        await guest.expect(ToGuest.FORGET)
        await guest.say(FromGuest.CLOSED, 16, 0, b"\2")
        await guest.say(FromGuest.DATA, 16, 0, b"a ghost")
        await guest.say(FromGuest.OPEN, 17, 80)
        assert (await link.accept()).id == 17
        with pytest.raises(StreamGone):
            await stream.send(0, b"x")


async def test_the_guest_forgets_a_stream_only_when_its_owner_says_so(fifos: FifoPair, guest: HostileGuest) -> None:
    async with running(await open_link(fifos, guest)) as link:
        await guest.say(FromGuest.OPEN, 16, 80)
        await guest.say(FromGuest.CLOSED, 16, 0, b"\2")
        stream = await link.accept()
        with pytest.raises(ValueError, match="not closed"):
            (await answered_open(link, guest, 17)).forget()
        assert await stream.wait_closed() is Closed.GONE
        assert guest.unread() == []
        stream.forget()
        assert (await guest.expect(ToGuest.FORGET)).stream == 16


async def answered_open(link: Link, guest: HostileGuest, number: int) -> Stream:
    await guest.say(FromGuest.OPEN, number, 80)
    return await link.accept()


async def test_what_came_before_the_client_left_is_still_received(fifos: FifoPair, guest: HostileGuest) -> None:
    async with running(await open_link(fifos, guest)) as link:
        await guest.say(FromGuest.OPEN, 16, 80)
        await guest.say(FromGuest.DATA, 16, 0, b"a request")
        await guest.say(FromGuest.CLOSED, 16, 0, b"\2")
        stream = await link.accept()
        assert await stream.wait_closed() is Closed.GONE
        assert await stream.receive() == b"a request"
        with pytest.raises(StreamGone):
            await stream.receive()


async def test_a_refused_stream_is_reset(fifos: FifoPair, guest: HostileGuest) -> None:
    status = status_record((16, 80, 0, 0, 3, 1, 0, 0, 1), next_stream=17)
    async with running(await open_link(fifos, guest, status)) as link:
        link.refuse(16)
        assert (await guest.expect(ToGuest.RESET)).stream == 16
        assert (await guest.expect(ToGuest.FORGET)).stream == 16
        await guest.say(FromGuest.CLOSED, 16, 0, b"\3")
        await guest.say(FromGuest.OPEN, 17, 80)
        assert (await link.accept()).id == 17


async def test_the_end_after_an_acknowledged_exit_is_no_loss(fifos: FifoPair, guest: HostileGuest) -> None:
    link = await open_link(fifos, guest)
    async with asyncio.TaskGroup() as group:
        group.create_task(link.run())
        await guest.say(FromGuest.EXIT, payload=struct.pack("<i", 256))
        assert await link.wait_exit() == 256
        link.acknowledge_exit()
        await guest.expect(ToGuest.EXIT_ACK)
        guest.hang_up()


async def test_a_closed_link_ends_its_streams_quietly(fifos: FifoPair, guest: HostileGuest) -> None:
    async with running(await open_link(fifos, guest)) as link:
        await guest.say(FromGuest.OPEN, 16, 80)
        stream = await link.accept()
        with pytest.raises(ExceptionGroup) as ended:
            async with asyncio.TaskGroup() as group:
                group.create_task(stream.receive())
                await asyncio.sleep(0)
                link.close()
        assert ended.group_contains(StreamGone)
        with pytest.raises(SandboxFailed) as closed:
            await link.accept()
        assert closed.value.code == "link_closed"
