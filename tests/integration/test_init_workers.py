"""torpor-init keeps docs/init-protocol.md, "Workers": programs started through it, beside the agent's."""

import os
import random
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.integration.init_client import (
    CLOSED,
    FORGET,
    HELLO,
    PROGRAMS,
    RESET,
    STATUS,
    Host,
    Pair,
    build,
    parse_status,
    running,
    spec,
    wait_until_gone,
)

WORK = 0x11
FIRST = 1 << 31
STDIN_WINDOW = 65536


@pytest.fixture(scope="module", params=PROGRAMS)
def binary(request: pytest.FixtureRequest) -> Path:
    return build(request.param)


@pytest.fixture
def pair(binary: Path, tmp_path: Path) -> Iterator[Pair]:
    with running(binary, tmp_path) as started:
        assert started[1].start(["sh", "-c", "while :; do sleep 100; done"]).arg == 0
        started[1].auto_ack = True
        yield started


def record(kind: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("<BI", kind[0], len(payload)) + payload


def number(value: int) -> bytes:
    return struct.pack("<i", value)


class Worker:
    """The host's end of one worker."""

    def __init__(self, host: Host, stream: int, request_id: int, name: bytes = b"torpor-exec") -> None:
        self.host, self.stream, self.sent = host, stream, 0
        host.send(WORK, stream, request_id, name)

    def say(self, data: bytes) -> None:
        self.host.data(self.stream, self.sent, data)
        self.sent += len(data)

    def run(self, script: str, **options: str) -> None:
        self.say(record(b"P", spec(["sh", "-c", script], **options)) + record(b"G"))

    def records(self) -> list[tuple[bytes, bytes]]:
        data, at = bytes(self.host.streams[self.stream].data), 0
        found: list[tuple[bytes, bytes]] = []
        while len(data) - at >= 5:
            kind, length = struct.unpack_from("<BI", data, at)
            if at + 5 + length > len(data):
                break
            found.append((bytes([kind]), data[at + 5 : at + 5 + length]))
            at += 5 + length
        return found

    def bytes_of(self, kind: bytes) -> bytes:
        return b"".join(payload for found, payload in self.records() if found == kind)

    def wait_for(self, kind: bytes, text: bytes) -> None:
        self.host.wait(lambda: text in self.bytes_of(kind), repr(text))

    def end(self) -> dict[bytes, bytes]:
        """All that it said, by kind, once it has said all."""
        received = self.host.streams[self.stream]
        self.host.wait(lambda: received.fin is not None or received.closed is not None, "end of the worker")
        self.host.send(RESET, self.stream)
        self.host.send(FORGET, self.stream)
        return {kind: self.bytes_of(kind) for kind, _ in self.records()}


def test_a_program_has_its_streams_and_its_end_is_told(pair: Pair) -> None:
    worker = Worker(pair[1], FIRST, 1)
    worker.run("cat; echo err >&2; pwd; exit 7", cwd="/usr")
    worker.say(record(b"I", b"some input\n") + record(b"I"))
    told = worker.end()
    assert (told[b"O"], told[b"E"]) == (b"some input\n/usr\n", b"err\n")
    assert told[b"X"] == number(7 << 8)
    assert told[b"W"] == number(11)


def test_what_the_agent_wants_to_run_before_a_checkpoint_has_run_when_its_worker_ends(pair: Pair) -> None:
    guest, host = pair
    assert Worker(host, FIRST, 1, b"torpor-prepare").end() == {}
    hooks, noted = guest.run_dir / "before-checkpoint.d", guest.directory / "noted"
    for name, does in [("10-hangs", "sleep 1000 & wait"), ("20-fails", "exit 1"), ("30-good", f"echo $0 >> {noted}")]:
        (hooks / name).write_text(f"#!/bin/sh\n{does}\n")
        (hooks / name).chmod(0o755)
    (hooks / "40-no-program").write_text(f"#!/bin/sh\necho never >> {noted}\n")
    (hooks / "50-directory").mkdir()
    (hooks / "60-nowhere").symlink_to("/no/such")
    assert Worker(host, FIRST + 1, 2, b"torpor-prepare").end() == {}
    assert noted.read_text() == f"{hooks}/30-good\n"


def test_a_request_that_comes_twice_is_started_once(pair: Pair, tmp_path: Path) -> None:
    first = Worker(pair[1], FIRST, 5)
    first.run(f"echo x >> {tmp_path}/count")
    assert first.end()[b"X"] == number(0)
    again = Worker(pair[1], FIRST + 1, 5)
    again.run(f"echo x >> {tmp_path}/count")
    assert b"asked before" in again.end()[b"F"]
    assert pair[1].expect(CLOSED, FIRST + 1).payload == b"\2"
    assert (tmp_path / "count").read_text() == "x\n"


def test_an_unknown_worker_and_one_before_the_agent_are_refused(binary: Path, tmp_path: Path) -> None:
    with running(binary, tmp_path) as (_, host):
        host.auto_ack = True
        assert b"does not run" in Worker(host, FIRST, 1).end()[b"F"]
        assert host.start(["sleep", "100"]).arg == 0
        assert b"no such worker" in Worker(host, FIRST + 1, 2, b"torpor-later").end()[b"F"]


def test_a_program_that_cannot_start_is_told_with_its_errno(pair: Pair) -> None:
    worker = Worker(pair[1], FIRST, 1)
    worker.say(record(b"P", spec(["no-such-program"])) + record(b"G"))
    failure = worker.end()[b"F"]
    assert struct.unpack_from("<i", failure)[0] == 2
    assert b"no-such-program" in failure


def test_a_signal_passes_input_that_nobody_reads(pair: Pair) -> None:
    worker = Worker(pair[1], FIRST, 1)
    worker.run("trap 'exit 9' INT; echo set; while :; do sleep 0.01; done")
    worker.wait_for(b"O", b"set")
    for _ in range(2):
        worker.say(record(b"I", bytes(STDIN_WINDOW // 2)))
    worker.say(record(b"S", number(signal.SIGINT)))
    assert worker.end()[b"X"] == number(9 << 8)


def test_who_holds_the_output_behind_its_program_does_not_delay_its_end(pair: Pair, tmp_path: Path) -> None:
    worker = Worker(pair[1], FIRST, 1)
    worker.run(f"yes & echo $! > {tmp_path}/pid; echo done; exit 3")
    told = worker.end()
    assert told[b"X"] == number(3 << 8)
    assert b"done\n" in told[b"O"]
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_program_lives_on_after_the_next_hello_and_no_status_tells_of_it(pair: Pair, tmp_path: Path) -> None:
    guest, host = pair
    os.mkfifo(tmp_path / "go")
    os.mkfifo(tmp_path / "on")
    worker = Worker(host, FIRST, 1)
    script = "echo begun; cat go; yes | head -c 1000000; echo through > end; cat on"
    worker.run(script, cwd=str(tmp_path))
    worker.wait_for(b"O", b"begun")
    assert not [stream for stream in host.hello().streams if stream >= FIRST]
    host.close()
    host = guest.connect_host()
    host.hello()
    host.auto_ack = True
    (tmp_path / "go").write_text("go\n")
    (tmp_path / "on").write_text("go\n")  # Opens when it is read, behind what was written to nobody.
    assert (tmp_path / "end").read_text() == "through\n"
    again = Worker(host, FIRST, 2)
    again.run("echo the number is free")
    assert again.end()[b"O"] == b"the number is free\n"


def test_the_version_is_the_lower_of_both(pair: Pair) -> None:
    _, host = pair
    for said, spoken in ((1, 1), (2, 2), (9, 2)):
        host.send(HELLO, 0, said)
        assert parse_status(host.expect(STATUS).payload).version == spoken


def test_a_worker_that_is_killed_ends_its_stream_without_an_exit(pair: Pair) -> None:
    guest, host = pair
    worker = Worker(host, FIRST, 1)
    worker.run("echo $PPID; exec sleep 100")
    worker.wait_for(b"O", b"\n")
    os.kill(int(worker.bytes_of(b"O")), signal.SIGKILL)
    assert b"X" not in worker.end()
    host.ping()
    assert guest.process.poll() is None


def test_a_reset_frees_the_stream_and_leaves_no_process_behind_a_program_that_ended(pair: Pair) -> None:
    _, host = pair
    worker = Worker(host, FIRST, 1)
    worker.run("echo $PPID; read line")
    worker.wait_for(b"O", b"\n")
    host.send(RESET, FIRST)  # Its stdin ends, so does it, and then its worker.
    host.expect(CLOSED, FIRST)
    wait_until_gone(int(worker.bytes_of(b"O")))


def entry(kind: bytes, path: bytes, target: bytes = b"") -> bytes:
    return record(kind, struct.pack("<IqQ", 0o644, 10**18, 3) + path + b"\0" + target)


EXEC_SAYS = record(b"P", spec(["cat"])) + record(b"G") + record(b"I", b"x" * 500) + record(b"I")
FILE_SAYS = entry(b"A", b"d/f") + record(b"B", b"abc") + record(b"Z") + entry(b"L", b"l", b"d/f")
COPY_SAYS = entry(b"D", b"") + entry(b"D", b"d") + FILE_SAYS + record(b"K")


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(
    ("name", "first", "then"),
    [("torpor-exec", b"", EXEC_SAYS), ("torpor-copy-in", record(b"R", b"place\0name"), COPY_SAYS)],
)
def test_a_worker_survives_any_bytes(
    binary: Path, tmp_path: Path, name: str, first: bytes, then: bytes, seed: int
) -> None:
    """A broken host gets a hang-up; the sanitized program must not trip, and nothing half made is left."""
    choice = random.Random(seed)
    data = bytearray(then * choice.randint(1, 3))
    for _ in range(choice.randint(0, 6)):
        data[choice.randrange(len(data))] = choice.choice([0, 0xFF, choice.randrange(256)])
    if choice.random() < 0.3:
        data = bytearray(choice.randbytes(2000))
    ended = converse(binary, name, first + data, choice, tmp_path)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert {path.name for path in tmp_path.iterdir()} <= {"place"}


def test_a_tree_is_taken_and_sent_again(binary: Path, tmp_path: Path) -> None:
    said = record(b"R", b"place\0name") + COPY_SAYS
    assert converse(binary, "torpor-copy-in", said, random.Random(1), tmp_path).stdout == record(b"K")
    assert (tmp_path / "place/d/f").read_bytes() == b"abc"
    sent = converse(binary, "torpor-copy-out", record(b"R", b"place"), random.Random(1), tmp_path).stdout
    assert all(part in sent for part in (b"d/f\0", record(b"B", b"abc"), record(b"Z"), b"l\0d/f"))
    assert sent.endswith(record(b"K"))
    # Now there is a directory, so the next goes into it by its own name, and the one after that finds it in its way.
    assert converse(binary, "torpor-copy-in", said, random.Random(1), tmp_path).stdout == record(b"K")
    assert (tmp_path / "place/name/d/f").read_bytes() == b"abc"
    assert b"File exists" in converse(binary, "torpor-copy-in", said, random.Random(1), tmp_path).stdout


def test_a_copy_in_writes_through_no_link(binary: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    said = record(b"R", b"place\0name") + entry(b"D", b"") + entry(b"L", b"l", b"../outside") + entry(b"A", b"l/x")
    assert converse(binary, "torpor-copy-in", said, random.Random(1), tmp_path).stdout[:1] == b"F"
    assert [path.name for path in tmp_path.rglob("*")] == ["outside"]


def converse(
    binary: Path, name: str, data: bytes, choice: random.Random, directory: Path
) -> subprocess.CompletedProcess[bytes]:
    """Say this to a worker in pieces, and hear all that it says; `stdout` is what came over its socket."""
    ours, theirs = socket.socketpair()
    heard = b""
    with ours, theirs:
        process = subprocess.Popen(
            [name], executable=binary, stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=directory
        )
        theirs.close()
        while data:
            piece = choice.randint(1, len(data))
            try:
                ours.sendall(data[:piece])
            except ConnectionError:
                break
            data = data[piece:]
        ours.shutdown(socket.SHUT_WR)
        ours.settimeout(30)
        with suppress(ConnectionError):
            while piece_heard := ours.recv(65536):
                heard += piece_heard
        ours.close()
        _, said = process.communicate(timeout=30)
    return subprocess.CompletedProcess([name], process.returncode, heard, said)
