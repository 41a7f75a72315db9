"""torpor-init keeps docs/init-protocol.md, as an ordinary process on two FIFOs; plain and under ASan and UBSan."""

import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.init_client import (
    CLOSED,
    CONSUMED,
    EXIT,
    EXIT_ACK,
    FIN,
    G_FIN,
    NATIVE,
    OPEN,
    Guest,
    Host,
    running,
)

PROGRAMS = {"plain": ("all", "torpor-init"), "sanitized": ("sanitize", "torpor-init-asan")}


@pytest.fixture(scope="session", params=PROGRAMS)
def binary(request: pytest.FixtureRequest) -> Path:
    target, name = PROGRAMS[request.param]
    subprocess.run(["make", "-s", "-C", str(NATIVE), target], check=True)
    return NATIVE / "build" / name


@pytest.fixture
def pair(binary: Path, tmp_path: Path) -> Iterator[tuple[Guest, Host]]:
    with running(binary, tmp_path) as pair:
        yield pair


def connect(guest: Guest) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", guest.ports[0]), timeout=10)
    client.settimeout(10)
    return client


def test_agent_runs_and_its_exit_is_told_until_acknowledged(pair):
    guest, host = pair
    started = host.start(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (started.arg, started.payload) == (0, b"")
    assert struct.unpack("<i", host.expect(EXIT).payload)[0] == 7 << 8
    assert host.request(1, 4) == b"out\n"
    assert host.request(2, 4) == b"err\n"
    assert (host.expect(G_FIN, 1).arg, host.expect(G_FIN, 2).arg) == (4, 4)
    host.send(EXIT_ACK)
    assert guest.process.wait(10) == 0


def test_answer_is_delivered_and_consumed(pair):
    guest, host = pair
    with connect(guest) as client:
        stream = host.expect(OPEN).stream
        client.sendall(b"request")
        assert host.request(stream, 7) == b"request"
        host.data(stream, 0, b"answer")
        host.send(FIN, stream, 6)
        assert client.recv(100) == b"answer"
        assert client.recv(100) == b""
    closed = host.expect(CLOSED, stream)
    assert (closed.arg, closed.payload) == (6, bytes([CONSUMED]))
