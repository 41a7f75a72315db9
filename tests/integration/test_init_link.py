"""torpor-init keeps docs/init-protocol.md: cuts, hosts that die, many connections, hostile ends."""

import random
import resource
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.init_client import (
    ACK,
    BARRIER,
    BARRIER_ACK,
    CLIENT_GONE,
    CLOSED,
    CONSUMED,
    CREDIT,
    EXIT_ACK,
    FIN,
    G_FIN,
    GONE,
    HALF_CLOSED,
    HELLO,
    OPEN,
    PING,
    PROGRAMS,
    RELEASE,
    RESET,
    RESUME,
    SIGNAL,
    WINDOW,
    Pair,
    build,
    bytes_of,
    closing,
    connect,
    fill,
    parse_status,
    read_all,
    running,
    send_in_background,
)


@pytest.fixture(scope="module", params=PROGRAMS)
def binary(request: pytest.FixtureRequest) -> Path:
    return build(request.param)


@pytest.fixture
def pair(binary: Path, tmp_path: Path) -> Iterator[Pair]:
    with running(binary, tmp_path) as started:
        yield started


def test_barrier_silences_everything_until_release(pair: Pair) -> None:
    guest, host = pair
    assert host.start(["sh", "-c", "while :; do echo x; done"]).arg == 0
    host.auto_ack = True
    with connect(guest) as client:
        client.sendall(b"before")
        host.request(16, 6)
        host.auto_ack = False
        host.send(BARRIER, 0, 7)
        answer = host.expect(BARRIER_ACK)
        assert answer.arg == 7
        assert not host.partial, "something follows the BARRIER_ACK"
        status = parse_status(answer.payload)
        for number, stream in status.streams.items():
            assert stream.sent == len(host.streams[number].data)
        host.frames.clear()
        client.sendall(b" and during")
        late = connect(guest)
        host.send(PING, 0, 3)
        host.data(16, 0, b"taken in meanwhile")
        assert client.recv(100) == b"taken in meanwhile"
        host.send(RELEASE, 0, 6)  # of another barrier
        before = guest.cpu_ticks()
        host.expect_silence(0.3)
        assert guest.cpu_ticks() - before < 5, "spins during the cut"
        host.auto_ack = True
        host.send(RELEASE, 0, 7)
        assert host.request(16, 17) == b"before and during"
        assert host.expect(OPEN).stream == 17
        host.ping()
        late.close()


def test_hello_ends_a_barrier(pair: Pair) -> None:
    guest, host = pair
    with connect(guest) as client:
        host.expect(OPEN)
        host.send(BARRIER, 0, 1)
        host.expect(BARRIER_ACK)
        client.sendall(b"request")
        status = host.hello()
        assert status.streams[16].read == 0
        host.send(CREDIT, 16, WINDOW)
        assert host.request(16, 7) == b"request"


def test_next_host_goes_on_where_the_dead_one_stopped(pair: Pair) -> None:
    guest, host = pair
    data = bytes_of(600_000)
    assert host.start(["sh", "-c", "echo started; exec sleep 1000"]).arg == 0
    with connect(guest) as client:
        client.setblocking(False)
        sent = client.send(data)
        host.request(16, 100_000)
        host.send(ACK, 16, 50_000)
        host.data(16, 0, b"answer, first part; ")
        host.ping()
        host.close()
        late = connect(guest)
        late.sendall(b"while nobody was there")
        old, host = host, guest.connect_host()
        status = host.hello()
        stream = status.streams[16]
        assert (status.phase, stream.acked, stream.sent, stream.flags) == (1, 50_000, 50_000, 0)
        assert (stream.taken, stream.accepted) == (20, 20)
        assert stream.read >= len(old.streams[16].data) >= 100_000
        host.ping()
        assert not [f for f in host.frames if f.stream == 16], "spoke of the stream before it was resumed"
        del old.streams[16].data[100_000:]  # what the dead host did not write down
        host.auto_ack = True
        host.adopt(status, old)
        send_in_background(client, data[sent:], host)
        assert host.request(16, len(data)) == data
        host.data(16, 14, b"part; second part")
        host.send(FIN, 16, 31)
        assert read_all(client) == b"answer, first part; second part"
        assert host.request(17, 22) == b"while nobody was there"
        late.close()


def test_end_of_a_request_is_told_again_after_resume(pair: Pair) -> None:
    guest, host = pair
    with connect(guest) as client:
        client.sendall(b"request")
        client.shutdown(socket.SHUT_WR)
        assert host.expect(G_FIN).arg == 7
        for position in (0, 7):
            host.close()
            host = guest.connect_host()
            assert host.hello().streams[16].flags == HALF_CLOSED
            host.streams[16].data += b"request"[:position]
            host.send(RESUME, 16, position)
            host.ping()
            assert len(host.streams[16].data) == position, "data without credit"
            host.send(CREDIT, 16, WINDOW)
            assert host.expect(G_FIN).arg == 7
            assert bytes(host.streams[16].data) == b"request"
        host.send(ACK, 16, 7)
        host.hello()
        host.ping()
        assert host.find(G_FIN) is None, "spoke of the stream before it was resumed"
        host.send(CREDIT, 16, WINDOW)
        assert host.expect(G_FIN).arg == 7


def test_resume_repeats_a_request_on_the_same_link(pair: Pair) -> None:
    guest, host = pair
    with connect(guest) as client:
        client.sendall(b"request")
        client.shutdown(socket.SHUT_WR)
        assert host.expect(G_FIN).arg == 7
        del host.streams[16].data[3:]
        host.send(RESUME, 16, 3)
        assert host.expect(G_FIN).arg == 7
        assert bytes(host.streams[16].data) == b"request"


def test_client_that_left_while_the_host_was_away_is_told(pair: Pair) -> None:
    guest, host = pair
    with connect(guest) as client:
        client.sendall(b"request")
        host.request(16, 7)
        host.data(16, 0, b"unread")
        assert client.recv(1, socket.MSG_PEEK) == b"u"
        host.close()
    host = guest.connect_host()
    status = host.wait_status(lambda status: bool(status.streams[16].flags & CLIENT_GONE))
    assert (status.streams[16].read, status.streams[16].accepted) == (7, 6)
    host.send(RESUME, 16, 0)
    host.send(CREDIT, 16, WINDOW)
    host.ping()
    assert host.frames == [], "nobody waits for what the client asked, and STATUS says how it left"


def test_three_hundred_connections_get_their_turn(pair: Pair) -> None:
    guest, host = pair
    clients = {}
    for number in range(300):
        client = connect(guest)
        client.sendall(struct.pack("<I", number))
        clients[number] = client
    host.wait(lambda: len([f for f in host.frames if f.type == OPEN]) == 256, "256 streams")
    host.ping()
    assert len([f for f in host.frames if f.type == OPEN]) == 256
    for stream in range(16, 316):
        (number,) = struct.unpack("<I", host.request(stream, 4))
        host.data(stream, 0, b"yes")
        host.send(FIN, stream, 3)
        with clients.pop(number) as client:
            assert read_all(client) == b"yes"
        assert closing(host, stream) == (CONSUMED, 3)
    assert host.hello().streams == {}


def test_clients_that_never_read_cost_bounded_memory(pair: Pair) -> None:
    guest, host = pair
    before = guest.memory_kib()
    clients = [connect(guest) for _ in range(8)]
    for number in range(8):
        fill(host, 16 + number)
    for stream in range(16, 24):
        for _ in range(8):
            host.data(stream, 100 * WINDOW, bytes(WINDOW))
    assert guest.memory_kib() - before < 8 * 256 + 2048
    for client in clients:
        client.close()


def test_request_that_memory_cannot_hold_is_given_up_and_init_goes_on(tmp_path: Path) -> None:
    with running(build("plain"), tmp_path) as (guest, host):
        size = guest.status_kib("VmSize") << 10
        resource.prlimit(guest.process.pid, resource.RLIMIT_AS, (size + 400_000, resource.RLIM_INFINITY))
        clients = [connect(guest) for _ in range(20)]
        for client in clients:
            client.sendall(bytes(1000))
        host.wait(lambda: any(frame.type == CLOSED for frame in host.frames), "CLOSED")
        assert host.expect(CLOSED).payload[0] == GONE
        for stream in range(16, 36):
            host.data(stream, 0, bytes(1000))
            host.send(RESET, stream)
        resource.prlimit(guest.process.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        host.start(["sh", "-c", "echo started"])
        assert host.request(1, 8) == b"started\n"
        with connect(guest) as client:
            client.sendall(b"request")
            assert host.request(36, 7) == b"request"
        for client in clients:
            client.close()


def test_connection_without_a_descriptor_waits_for_one(pair: Pair) -> None:
    guest, host = pair
    unlimited = resource.prlimit(guest.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(guest.process.pid, resource.RLIMIT_NOFILE, (8, unlimited[1]))
    clients = [connect(guest) for _ in range(10)]
    host.expect(OPEN)
    host.ping()
    before = guest.cpu_ticks()
    host.expect_silence(0.5)
    assert guest.cpu_ticks() - before < 5
    resource.prlimit(guest.process.pid, resource.RLIMIT_NOFILE, unlimited)
    host.wait(lambda: 25 in host.streams, "the last one")
    for client in clients:
        client.close()


def test_host_that_reads_nothing_costs_bounded_memory(pair: Pair) -> None:
    guest, host = pair
    before = guest.memory_kib()
    assert host.start(["sh", "-c", "while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done"]).arg == 0
    host.careless = True
    for number in range(20_000):
        host.send(HELLO if number % 1000 == 0 else PING, 0, number)
        host.data(number, number, b"of no stream")
        if number % 100 == 0:
            with connect(guest) as client:
                client.sendall(bytes(1000))
    assert guest.memory_kib() - before < 6000
    host.ping(0)


def test_random_frames_of_the_right_link_do_no_harm(binary: Path, tmp_path: Path) -> None:
    with running(binary, tmp_path, "--request-bytes-max", "70000", "--total-bytes-max", "200000") as (
        guest,
        host,
    ):
        host.start(["sh", "-c", "while :; do echo x; sleep 0.001; done"])
        host.careless = True
        choice = random.Random(4)
        clients: list[socket.socket] = []
        kinds = [kind for kind in range(0x18) if kind not in (SIGNAL, EXIT_ACK)]
        numbers = [0, 1, 5, 100, WINDOW, 2**32, 2**63, 2**64 - 1]
        for round_number in range(4000):
            if round_number % 20 == 0:
                clients.append(connect(guest))
                clients[-1].setblocking(False)
                clients[-1].send(bytes(choice.randrange(1, 100_000)))
            if len(clients) > 20:
                clients.pop(choice.randrange(20)).close()
            stream = choice.choice([0, 1, 2, *range(10, 16 + len(clients)), round_number // 20])
            payload = choice.randbytes(choice.choice([0, 1, 80, 200, 32768]))
            host.send(choice.choice(kinds), stream, choice.choice([*numbers, choice.randrange(300_000)]), payload)
            host.drop_frames()
        host.close()
        host = guest.connect_host()
        host.careless = True
        status = host.hello()
        host.ping()
        assert status.phase == 1
        host.send(SIGNAL, signal.SIGKILL, status.last_signal_id + 1)
        while status.phase != 2:
            for number, stream in status.streams.items():
                host.send(ACK if stream.output else RESET, number, stream.read)
            status = host.hello()
        for client in clients:
            client.close()
        host.send(EXIT_ACK)
        assert guest.process.wait(20) == 0
