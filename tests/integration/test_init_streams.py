"""torpor-init keeps docs/init-protocol.md: requests, their limits, responses, how clients close."""

import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.init_client import (
    ACK,
    CLIENT_GONE,
    CLOSED,
    CONSUMED,
    CREDIT,
    FIN,
    FORGET,
    G_DATA,
    G_FIN,
    GONE,
    HALF_CLOSED,
    HAS_CONSUMED,
    HOST_FIN,
    NOT_RESUMABLE,
    OPEN,
    PROGRAMS,
    RESET,
    RESET_BY_HOST,
    RESUME,
    TAKEN,
    WAS_RESET,
    WINDOW,
    Host,
    Pair,
    build,
    bytes_of,
    closing,
    connect,
    fill,
    read_all,
    running,
    send_in_background,
)

RST_ON_CLOSE = struct.pack("ii", 1, 0)


@pytest.fixture(scope="module", params=PROGRAMS)
def binary(request: pytest.FixtureRequest) -> Path:
    return build(request.param)


@pytest.fixture
def pair(binary: Path, tmp_path: Path) -> Iterator[Pair]:
    with running(binary, tmp_path) as started:
        yield started


def test_answer_that_is_read_to_its_end_is_consumed(pair: Pair) -> None:
    guest, host = pair
    with connect(guest) as client:
        opened = host.expect(OPEN)
        assert (opened.stream, opened.arg) == (16, guest.ports[0])
        client.sendall(b"request")
        assert host.request(16, 7) == b"request"
        host.send(ACK, 16, 7)
        host.data(16, 0, b"answer")
        host.send(FIN, 16, 6)
        assert read_all(client) == b"answer"
    assert closing(host, 16) == (CONSUMED, 6)
    assert host.hello().streams == {}


def test_each_listener_tells_its_port(binary: Path, tmp_path: Path) -> None:
    with running(binary, tmp_path, listen=2) as (guest, host):
        with connect(guest, 1):
            assert host.expect(OPEN).arg == guest.ports[1]
        with connect(guest, 0):
            assert host.expect(OPEN).arg == guest.ports[0]


@pytest.mark.parametrize("crossing", [ACK, RESET])
def test_end_is_remembered_until_the_host_forgets_it(pair: Pair, crossing: int) -> None:
    """An acknowledgement, or a reset, may be on its way when the client closes: that is no word about the end."""
    guest, host = pair
    with connect(guest) as client:
        client.sendall(b"request")
        host.request(16, 7)
        host.send(FIN, 16, 0)
        assert read_all(client) == b""
    assert host.expect(CLOSED).payload[0] == CONSUMED
    host.send(crossing, 16, 7)
    assert host.hello().streams[16].flags == HAS_CONSUMED | HOST_FIN
    host.send(crossing, 16, 7)
    assert host.hello().streams[16].flags == HAS_CONSUMED | HOST_FIN
    host.send(FORGET, 16)
    assert host.hello().streams == {}
    assert host.find(CLOSED) is None, "STATUS had it"


def test_open_stream_is_not_forgotten(pair: Pair) -> None:
    guest, host = pair
    with connect(guest) as client:
        client.sendall(b"request")
        host.request(16, 7)
        host.send(FORGET, 16)
        assert host.hello().streams[16].read == 7


def test_status_says_how_each_client_left(pair: Pair) -> None:
    guest, host = pair
    consumed, gone, reset = [connect(guest) for _ in range(3)]
    for stream in (16, 17, 18):
        assert host.expect(OPEN).stream == stream
    host.send(FIN, 16, 0)
    assert read_all(consumed) == b""
    consumed.close()
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
    gone.close()
    host.send(RESET, 18)
    for _ in range(3):
        host.expect(CLOSED)
    flags = {number: stream.flags for number, stream in host.hello().streams.items()}
    assert flags == {16: HAS_CONSUMED | HOST_FIN, 17: CLIENT_GONE, 18: WAS_RESET}
    reset.close()


def break_off(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
    client.close()


def order_of(host: Host, *kinds: int) -> list[tuple[int, int]]:
    """Kind and stream of what came, repetitions left out."""
    came = [(frame.type, frame.stream) for frame in host.frames if frame.type in kinds]
    return list(dict.fromkeys(came))


def test_end_goes_before_the_retry_that_it_caused(pair: Pair) -> None:
    guest, host = pair
    first = connect(guest)
    first.sendall(b"request")
    host.request(16, 7)
    guest.process.send_signal(signal.SIGSTOP)
    break_off(first)
    with connect(guest) as retry:
        retry.sendall(b"request")
        guest.process.send_signal(signal.SIGCONT)
        host.request(17, 7)
    assert order_of(host, OPEN, CLOSED) == [(OPEN, 16), (CLOSED, 16), (OPEN, 17)]


def test_retry_waits_behind_what_its_predecessor_still_has_to_send(pair: Pair) -> None:
    """The host reads nothing, so that both requests wait in init."""
    guest, host = pair
    first = connect(guest)
    first.sendall(bytes(WINDOW - 1))
    guest.process.send_signal(signal.SIGSTOP)
    break_off(first)
    with connect(guest) as retry:
        retry.sendall(b"request")
        guest.process.send_signal(signal.SIGCONT)
        host.request(17, 7)
        order = order_of(host, G_DATA, CLOSED)
        assert order.index((CLOSED, 16)) < order.index((G_DATA, 17))


@pytest.mark.parametrize("breaks_off", [False, True])
def test_retry_waits_until_the_new_host_resumes_the_stream_that_ended(pair: Pair, breaks_off: bool) -> None:
    guest, host = pair
    with connect(guest) as first:
        first.sendall(b"request")
        host.request(16, 7)
        if breaks_off:
            host.hello()
            break_off(first)
        else:
            first.shutdown(socket.SHUT_WR)
            host.expect(G_FIN, 16)
            host.hello()
        with connect(guest) as retry:
            retry.sendall(b"request")
            assert host.expect(OPEN, 17)
            host.ping()
            assert host.streams[17].data == b""
            host.frames.clear()
            host.streams[16].data.clear()
            host.send(RESUME, 16, 0)
            host.send(CREDIT, 16, WINDOW)
            host.request(17, 7)
    end = CLOSED if breaks_off else G_FIN
    assert order_of(host, end, G_DATA) == [(G_DATA, 16), (end, 16), (G_DATA, 17)]


def test_nothing_of_a_stream_goes_after_its_closed(binary: Path, tmp_path: Path) -> None:
    """A request too large to be sent again has an end that can't be sent either, until its bytes are acknowledged."""
    data = bytes_of(3 << 20)
    with running(binary, tmp_path, "--request-bytes-max", str(1 << 20)) as (guest, host):
        client = connect(guest)
        host.expect(OPEN)
        host.send(CREDIT, 16, 1 << 30)
        send_in_background(client, data, host)
        client.shutdown(socket.SHUT_WR)
        assert host.expect(G_FIN, 16).arg == len(data)
        host.hello()
        host.send(CREDIT, 16, 1 << 30)
        break_off(client)
        assert host.expect(CLOSED, 16).payload[0] == GONE
        host.send(ACK, 16, len(data))
        host.send(RESUME, 16, len(data))
        host.ping()
        assert host.find(G_FIN) is None


def test_client_that_half_closed_first_is_answered_and_consumes(pair: Pair) -> None:
    guest, host = pair
    with connect(guest) as client:
        client.sendall(b"all of it")
        client.shutdown(socket.SHUT_WR)
        assert host.expect(G_FIN).arg == 9
        assert host.hello().streams[16].flags == HALF_CLOSED
        host.data(16, 0, b"answer")
        host.send(FIN, 16, 6)
        assert read_all(client) == b"answer"
    host.send(RESUME, 16, 9)
    assert closing(host, 16) == (CONSUMED, 6)


def test_client_that_leaves_early_is_gone(pair: Pair) -> None:
    guest, host = pair
    with connect(guest) as client:
        client.sendall(b"request")
        stream = host.expect(OPEN).stream
        host.data(stream, 0, b"first part")
        assert client.recv(100) == b"first part"
    assert host.expect(G_FIN, stream).arg == 7  # so far an orderly half-close
    host.data(stream, 10, b"more")
    host.wait(lambda: host.streams[stream].closed or not host.data(stream, 14, b"x"), "CLOSED")
    assert closing(host, stream)[0] == GONE


@pytest.mark.parametrize("unread", [0, 5, WINDOW])
def test_client_that_closes_with_unread_bytes_or_by_rst_is_gone(pair: Pair, unread: int) -> None:
    guest, host = pair
    with connect(guest) as client:
        stream = host.expect(OPEN).stream
        host.data(stream, 0, bytes(unread))
        if unread:
            host.send(FIN, stream, unread)
            assert client.recv(1, socket.MSG_PEEK) == b"\0"
        else:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
    assert closing(host, stream)[0] == GONE


def test_half_closed_client_that_breaks_off_is_gone_at_once(pair: Pair) -> None:
    guest, host = pair
    with connect(guest) as client:
        stream = host.expect(OPEN).stream
        client.shutdown(socket.SHUT_WR)
        host.expect(G_FIN, stream)
        host.data(stream, 0, bytes(WINDOW))
        assert client.recv(1, socket.MSG_PEEK) == b"\0"
    assert closing(host, stream)[0] == GONE


def test_end_that_waits_behind_unread_bytes_is_not_consumed_yet(pair: Pair) -> None:
    """Both directions are shut and the kernel has everything, but the client's window is full."""
    guest, host = pair
    for reads, how in ((True, CONSUMED), (False, GONE)):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", guest.ports[0]))
            client.shutdown(socket.SHUT_WR)
            stream = host.expect(OPEN).stream
            host.expect(G_FIN, stream)
            host.data(stream, 0, bytes(100_000))
            host.send(FIN, stream, 100_000)
            host.ping()
            assert host.find(CLOSED) is None
            assert not reads or len(read_all(client)) == 100_000
        assert closing(host, stream) == (how, 100_000)


def test_client_that_closes_at_its_content_length_has_consumed(pair: Pair) -> None:
    """It does not wait for the end of the connection, and the host's FIN comes after its own."""
    guest, host = pair
    with connect(guest) as client:
        stream = host.expect(OPEN).stream
        host.data(stream, 0, b"answer")
        assert client.recv(6) == b"answer"
    host.expect(G_FIN, stream)
    host.send(FIN, stream, 6)
    assert closing(host, stream) == (CONSUMED, 6)


def test_client_that_sends_and_leaves_is_gone(pair: Pair) -> None:
    guest, host = pair
    with connect(guest) as client:
        client.sendall(b"request")
    assert host.request(16, 7) == b"request"
    host.expect(G_FIN, 16)
    host.data(16, 0, b"answer")
    host.send(FIN, 16, 6)
    assert closing(host, 16) == (GONE, 6)


def test_client_that_goes_on_sending_after_its_answer_is_consumed_in_the_end(pair: Pair) -> None:
    guest, host = pair
    with connect(guest) as client:
        stream = host.expect(OPEN).stream
        host.send(FIN, stream, 0)
        assert read_all(client) == b""
        client.sendall(bytes(2_000_000))  # beyond all credit, and refused by nobody
    assert closing(host, stream) == (CONSUMED, 0)


def test_client_that_is_reset_sees_a_reset(pair: Pair) -> None:
    guest, host = pair
    with connect(guest) as client:
        client.sendall(b"request")
        stream = host.expect(OPEN).stream
        host.request(stream, 7)
        host.data(stream, 0, b"half an ans")
        assert client.recv(100) == b"half an ans"
        host.send(RESET, stream)
        with pytest.raises(ConnectionResetError):
            client.recv(100)
    assert closing(host, stream)[0] == RESET_BY_HOST
    assert host.hello().streams == {}


def test_reset_of_a_stream_from_before_hello_is_told_and_forgotten(pair: Pair) -> None:
    guest, host = pair
    with connect(guest) as client:
        client.sendall(b"request")
        host.request(16, 7)
        host.hello()
        host.send(RESET, 16)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        assert closing(host, 16)[0] == RESET_BY_HOST
        assert host.hello().streams == {}


def test_request_stops_at_the_credit_and_goes_on_with_more(pair: Pair) -> None:
    guest, host = pair
    data = bytes_of(1_000_000)
    with connect(guest) as client:
        client.setblocking(False)
        sent = client.send(data)
        assert host.request(16, WINDOW) == data[:WINDOW]
        host.ping()
        assert len(host.streams[16].data) == WINDOW
        host.write(host.wire(CREDIT, 16, WINDOW + 1000) + host.wire(CREDIT, 16, 5))  # never shrinks
        host.request(16, WINDOW + 1000)
        host.ping()
        assert len(host.streams[16].data) == WINDOW + 1000
        host.auto_ack = True
        host.ack(16, WINDOW + 1000)
        send_in_background(client, data[sent:], host)
        assert host.request(16, len(data)) == data
        assert host.hello().streams[16].acked == len(data)


def test_acknowledged_request_bytes_are_freed(binary: Path, tmp_path: Path) -> None:
    """One mebibyte is the total, and ten go through."""
    data = bytes_of(10 << 20)
    with (
        running(binary, tmp_path, "--total-bytes-max", str(1 << 20)) as (guest, host),
        connect(guest) as client,
    ):
        host.auto_ack = True
        before = guest.memory_kib()
        send_in_background(client, data, host)
        assert host.request(16, len(data)) == data
        if "asan" not in binary.name:  # which keeps what is freed in quarantine
            assert guest.memory_kib() - before < 3000


def test_request_above_its_limit_flows_but_cannot_be_resumed(binary: Path, tmp_path: Path) -> None:
    data = bytes_of(3 << 20)
    with (
        running(binary, tmp_path, "--request-bytes-max", str(1 << 20)) as (guest, host),
        connect(guest) as client,
    ):
        host.send(CREDIT, 16, 1 << 30)
        host.expect(OPEN)
        host.send(CREDIT, 16, 1 << 30)
        send_in_background(client, data, host)
        assert host.request(16, len(data)) == data
        status = host.hello().streams[16]
        assert (status.flags, status.read, status.acked) == (NOT_RESUMABLE, len(data), 0)
        host.send(RESUME, 16, 0)
        host.send(CREDIT, 16, 1 << 30)
        host.ping()
        assert host.find(G_DATA) is None or len(host.streams[16].data) == len(data)
        host.send(RESET, 16)
        assert host.expect(CLOSED).payload[0] == RESET_BY_HOST


def test_requests_pause_at_the_total_and_go_on_when_some_are_acknowledged(binary: Path, tmp_path: Path) -> None:
    total = 512 * 1024
    with running(binary, tmp_path, "--total-bytes-max", str(total)) as (guest, host):
        clients = [connect(guest) for _ in range(4)]
        for client in clients:
            client.setblocking(False)
            client.send(bytes_of(WINDOW))
        host.wait(lambda: sum(len(s.data) for s in host.streams.values()) > total // 2, "half of the total")
        host.ping()
        assert sum(len(s.data) for s in host.streams.values()) <= total
        host.auto_ack = True
        for stream in range(16, 20):
            host.send(ACK, stream, len(host.streams[stream].data))
        for stream in range(16, 20):
            assert host.request(stream, WINDOW) == bytes_of(WINDOW)
        for client in clients:
            client.close()


def test_response_is_bounded_by_its_window_and_all_arrives(pair: Pair) -> None:
    guest, host = pair
    with connect(guest) as client:
        stream = host.expect(OPEN).stream
        taken = fill(host, stream)
        host.frames.clear()
        host.data(stream, taken, b"too much")
        frame = host.expect(TAKEN)
        assert struct.unpack("<Q", frame.payload)[0] == taken == frame.arg + WINDOW
        host.send(FIN, stream, taken)
        assert len(read_all(client)) == taken
    assert closing(host, stream) == (CONSUMED, taken)


def test_gap_is_answered_overlap_is_cut_repetition_is_dropped(pair: Pair) -> None:
    guest, host = pair
    with connect(guest) as client:
        stream = host.expect(OPEN).stream
        host.data(stream, 0, b"0123")
        host.data(stream, 6, b"67")
        host.data(stream, 2, b"2345")
        host.data(stream, 0, b"????")
        host.data(stream, 2**64 - 1, b"wraps")
        host.data(stream, 6, b"67")
        host.send(FIN, stream, 3)  # shorter than what was sent: not true, not taken
        host.data(stream, 8, b"89")
        host.send(FIN, stream, 10)
        assert read_all(client) == b"0123456789"
    host.ping()
    answers = [(f.arg, f.payload[0]) for f in host.frames if f.type == TAKEN]
    assert all(accepted <= taken for accepted, taken in answers)
    assert closing(host, stream) == (CONSUMED, 10)


def test_fin_before_its_data_waits_for_it(pair: Pair) -> None:
    guest, host = pair
    with connect(guest) as client:
        stream = host.expect(OPEN).stream
        host.send(FIN, stream, 6)
        assert host.hello().streams[stream].flags == HOST_FIN
        host.data(stream, 0, b"answer and more than was said")
        assert read_all(client) == b"answer"
