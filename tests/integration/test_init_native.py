"""torpor-init keeps docs/init-protocol.md: the agent's life, signals, restores, the command line."""

import os
import shlex
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.init_client import (
    ALIVE,
    CREDIT,
    EXIT,
    EXIT_ACK,
    FIN,
    OPEN,
    PONG,
    PROGRAMS,
    SIGNAL,
    SPEC,
    START,
    STARTED,
    STATUS,
    Guest,
    Host,
    Pair,
    build,
    connect,
    launch,
    parse_status,
    running,
    spec,
    wait_until_gone,
)

LIFE = struct.pack("<QQ", 1, 0) + bytes(64)


@pytest.fixture(scope="module", params=PROGRAMS)
def binary(request: pytest.FixtureRequest) -> Path:
    return build(request.param)


@pytest.fixture
def pair(binary: Path, tmp_path: Path) -> Iterator[Pair]:
    with running(binary, tmp_path) as started:
        yield started


def exit_status(host: Host) -> int:
    return struct.unpack("<i", host.expect(EXIT).payload)[0]


def output(host: Host, stream: int = 1) -> bytes:
    """All of an output that has ended or will."""
    host.wait(lambda: host.streams[stream].fin is not None, "end of the output")
    assert host.streams[stream].fin == len(host.streams[stream].data)
    return bytes(host.streams[stream].data)


def shell(host: Host, script: str, **options: object) -> None:
    assert host.start(["sh", "-c", script], **options).arg == 0


def wait_for_output(host: Host, text: bytes) -> None:
    host.wait(lambda: text in host.streams[1].data, repr(text))


def test_exit_is_told_after_each_hello_until_acknowledged(pair: Pair) -> None:
    guest, host = pair
    shell(host, "echo out; echo err >&2; exit 7")
    assert exit_status(host) == 7 << 8
    assert (output(host, 1), output(host, 2)) == (b"out\n", b"err\n")
    host.close()
    host = guest.connect_host()
    status = host.hello()
    assert (status.phase, status.wait_status) == (2, 7 << 8)
    assert exit_status(host) == 7 << 8
    host.send(EXIT_ACK)
    assert guest.process.wait(10) == 0


def test_death_by_signal_is_in_the_raw_wait_status(pair: Pair) -> None:
    _, host = pair
    shell(host, "kill -9 $$")
    assert exit_status(host) == signal.SIGKILL


def test_init_stays_while_the_agent_runs(pair: Pair) -> None:
    guest, host = pair
    host.send(EXIT_ACK)
    shell(host, "exec sleep 1000")
    host.send(EXIT_ACK)
    host.ping()
    host.send(SIGNAL, signal.SIGTERM, 1)
    assert exit_status(host) == signal.SIGTERM
    host.ping()
    assert guest.process.poll() is None


@pytest.mark.parametrize(
    ("args", "cwd", "text"),
    [(["/no/such"], "/", b"cannot run /no/such"), (["true"], "/no/where", b"working directory /no/where")],
)
def test_agent_that_cannot_start_says_why(pair: Pair, args: list[str], cwd: str, text: bytes) -> None:
    guest, host = pair
    started = host.start(args, cwd=cwd)
    assert (started.arg, text in started.payload) == (2, True), started
    host.close()
    host = guest.connect_host()
    status = host.hello()
    assert (status.phase, status.start_errno, status.streams) == (3, 2, {})
    host.send(EXIT_ACK)
    assert guest.process.wait(10) == 0


def test_command_is_searched_in_the_path_of_the_spec(pair: Pair, tmp_path: Path) -> None:
    _, host = pair
    tool = tmp_path / "only-here"
    tool.write_text("#!/bin/sh\necho found $NAME\n")
    tool.chmod(0o755)
    assert host.start(["only-here"], env={"PATH": str(tmp_path), "NAME": "it"}).arg == 0
    assert output(host) == b"found it\n"


def test_a_failed_start_can_be_tried_again(pair: Pair) -> None:
    _, host = pair
    assert host.start(["/no/such"]).arg == 2
    shell(host, "echo yes")
    assert output(host) == b"yes\n"


def damaged_specs() -> list[bytes]:
    good = spec(["true"])
    return [
        b"",
        good[:-1],
        good + b"more\0",
        b"/\0" + b"0\0" + b"0\0",
        b"/\0" + b"99999999999999999999\0true\0" + b"0\0",
        b"/\0" + b"1000000\0true\0" + b"0\0",
        b"/\0" + b"18446744073709551615\0true\0" + b"0\0",
        b"/\0" + b"-1\0true\0" + b"0\0",
        b"/\0" + b"1\0true\0" + b"4\0A=B\0",
    ]


@pytest.mark.parametrize("data", damaged_specs())
def test_damaged_spec_is_refused(pair: Pair, data: bytes) -> None:
    _, host = pair
    host.send_spec(data)
    host.send(START, 0, len(data), LIFE)
    assert host.expect(STARTED).arg == 22
    shell(host, "exit 0")
    assert exit_status(host) == 0


def test_spec_of_the_wrong_length_or_over_its_bound_is_refused(pair: Pair) -> None:
    _, host = pair
    data = spec(["true"])
    host.send_spec(data)
    host.send(START, 0, len(data) + 1, LIFE)
    assert host.expect(STARTED).arg == 22
    too_long = bytes(2 << 20) + data
    host.send_spec(too_long)
    host.send(START, 0, len(too_long), LIFE)
    assert host.expect(STARTED).arg == 22
    large = spec(["sh", "-c", "echo ${#BIG}"], env={"PATH": os.environ["PATH"], "BIG": "x" * 100_000})
    host.send(SPEC, 0, 0, b"what a dead host began")
    host.send_spec(large)
    host.send(START, 0, len(large), LIFE)
    assert host.expect(STARTED).arg == 0
    assert output(host) == b"100000\n"


def test_agent_starts_as_a_program_expects(pair: Pair, tmp_path: Path) -> None:
    _, host = pair
    script = """if True:
        import os, signal, sys
        print(os.getsid(0) == os.getpgrp() == os.getpid(), os.getcwd(), sorted(os.environ))
        print([s.name for s in signal.Signals if signal.getsignal(s) == signal.SIG_IGN])
        print(signal.pthread_sigmask(signal.SIG_BLOCK, []), sys.stdin.read() == "")
        print(os.listdir("/proc/self/fd"))
    """
    env = {"PATH": "/usr/bin:/bin", "ONLY": "this", "LC_ALL": "C.UTF-8"}
    # Python itself ignores the two; nothing else may be ignored. Descriptor 3 is the listing's own.
    assert host.start([sys.executable, "-S", "-E", "-c", script], cwd=str(tmp_path), env=env).arg == 0
    expected = f"True {tmp_path} ['LC_ALL', 'ONLY', 'PATH']\n['SIGPIPE', 'SIGXFSZ']\n"
    expected += "set() True\n['0', '1', '2', '3']\n"
    assert (output(host), output(host, 2)) == (expected.encode(), b"")


def test_second_start_is_ignored(pair: Pair) -> None:
    _, host = pair
    shell(host, "echo once; read x; echo done")
    data = spec(["echo", "twice"])
    host.send_spec(data)
    host.send(START, 0, len(data), LIFE)
    assert output(host) == b"once\ndone\n"
    host.ping()
    assert host.find(STARTED) is None


def test_unacknowledged_output_blocks_the_agent_at_one_mebibyte(pair: Pair) -> None:
    _, host = pair
    shell(host, "head -c 3000000 /dev/zero; echo end >&2")
    host.wait(lambda: len(host.streams[1].data) == 262144, "the credit's worth")
    host.send(CREDIT, 1, 262144 + 1001)
    host.wait(lambda: len(host.streams[1].data) >= 262144 + 1001, "a little more")
    host.ping()
    assert len(host.streams[1].data) == 262144 + 1001
    host.send(CREDIT, 1, 10_000_000)
    assert host.request(1, 1 << 20) == bytes(1 << 20)
    host.ping()
    assert (len(host.streams[1].data), len(host.streams[2].data)) == (1 << 20, 0)
    host.auto_ack = True
    host.ack(1, 1 << 20)
    assert output(host) == bytes(3_000_000)
    assert output(host, 2) == b"end\n"


def test_what_the_agent_leaves_behind_is_read_and_killed(pair: Pair) -> None:
    _, host = pair
    shell(host, "sleep 1000 & echo $!; head -c 60000 /dev/zero; exit 3")
    host.auto_ack = True
    assert exit_status(host) == 3 << 8
    pid, _, rest = output(host).partition(b"\n")
    assert rest == bytes(60000)
    wait_until_gone(int(pid))


def test_exit_waits_for_output_that_the_host_does_not_take(pair: Pair) -> None:
    _, host = pair
    shell(host, "head -c 1100000 /dev/zero")
    host.request(1, 262144)
    host.ping()
    assert host.find(EXIT) is None
    host.auto_ack = True
    host.ack(1, 262144)
    assert exit_status(host) == 0
    assert output(host) == bytes(1_100_000)


def test_sigterm_to_init_is_forwarded_to_the_group(pair: Pair) -> None:
    guest, host = pair
    shell(host, "trap 'echo got it; exit 4' TERM; echo ready; sleep 1000 & wait")
    wait_for_output(host, b"ready\n")
    guest.process.send_signal(signal.SIGTERM)
    assert exit_status(host) == 4 << 8
    assert output(host) == b"ready\ngot it\n"
    assert guest.process.poll() is None


def test_signal_is_sent_once_for_each_request_id(pair: Pair) -> None:
    _, host = pair
    counting = """if True:
        import os, signal
        signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"usr1\\n"))
        os.write(1, b"ready\\n")
        while True: signal.pause()
    """
    assert host.start([sys.executable, "-S", "-E", "-c", counting]).arg == 0
    wait_for_output(host, b"ready\n")
    for request_id in (1, 1, 1):
        host.send(SIGNAL, signal.SIGUSR1, request_id)
    wait_for_output(host, b"usr1\n")
    host.send(SIGNAL, signal.SIGUSR1, 2)
    wait_for_output(host, b"usr1\nusr1\n")
    host.send(SIGNAL, signal.SIGTERM, 2)
    host.send(SIGNAL, 9999, 3)
    assert host.hello().last_signal_id == 3
    host.send(SIGNAL, signal.SIGKILL, 4)
    assert exit_status(host) == signal.SIGKILL


def write_hook(guest: Guest, name: str, body: str, mode: int = 0o755) -> None:
    hooks = guest.run_dir / "after-restore.d"
    hooks.mkdir(parents=True, exist_ok=True)
    (hooks / name).write_text(f"#!/bin/sh\n{body}\n")
    (hooks / name).chmod(mode)


def test_restored_writes_its_files_and_runs_the_hooks_once(pair: Pair) -> None:
    guest, host = pair
    shell(host, "read x < /dev/zero")
    assert (guest.run_dir / "incarnation").read_text() == "1\n"
    assert (guest.run_dir / "entropy").read_bytes() == bytes(range(64))
    log = shlex.quote(str(guest.directory / "hooks.log"))
    write_hook(guest, "20-second", f"echo second >> {log}")
    write_hook(guest, "10-first", f"echo $TORPOR_INCARNATION $TORPOR_SLEPT_NS >> {log}; exit 1")
    write_hook(guest, "15-not-executable", f"echo never >> {log}", mode=0o644)
    for _ in range(2):
        host.restored(5, b"A=1\0B=2\0")
        assert host.expect(ALIVE).arg == 5
    assert (guest.directory / "hooks.log").read_text() == "5 7\nsecond\n"
    assert (guest.run_dir / "incarnation").read_text() == "5\n"
    assert (guest.run_dir / "entropy").read_bytes() == bytes(64)
    assert (guest.run_dir / "environment").read_text() == "A=1\nB=2\n"
    host.restored(6, b"C=3\0")
    assert host.expect(ALIVE).arg == 6
    assert (guest.run_dir / "environment").read_text() == "A=1\nB=2\nC=3\n"
    assert (guest.directory / "hooks.log").read_text() == "5 7\nsecond\n6 7\nsecond\n"
    assert host.hello().incarnation == 6


def test_link_lives_while_a_hook_runs_and_alive_waits_for_it(pair: Pair, tmp_path: Path) -> None:
    guest, host = pair
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    write_hook(guest, "hook", f"read x < {shlex.quote(str(gate))}")
    host.restored(2)
    host.ping()
    host.restored(2)
    host.ping()
    assert host.find(ALIVE) is None
    gate.write_text("go\n")
    assert host.expect(ALIVE).arg == 2
    host.ping()
    assert host.find(ALIVE) is None


def test_hook_that_hangs_is_killed(pair: Pair) -> None:
    guest, host = pair
    write_hook(guest, "10-hangs", "sleep 1000 & wait")
    write_hook(guest, "20-good", f"touch {shlex.quote(str(guest.directory / 'ran'))}")
    host.restored(2)
    assert host.expect(ALIVE).arg == 2
    assert (guest.directory / "ran").exists()


def test_next_incarnation_ends_the_hooks_of_the_last(pair: Pair, tmp_path: Path) -> None:
    """The image may have been saved while hooks ran."""
    guest, host = pair
    gate, pid = tmp_path / "gate", tmp_path / "pid"
    os.mkfifo(gate)
    waits = f"echo $$ > {shlex.quote(str(pid))}; read x < {shlex.quote(str(gate))}"
    write_hook(guest, "hook", f"[ $TORPOR_INCARNATION = 3 ] || {{ {waits}; }}")
    host.restored(2)
    with gate.open("w"):  # opens when the hook does
        host.restored(3)
        assert host.expect(ALIVE).arg == 3
        wait_until_gone(int(pid.read_text()))


def test_run_directory_full_of_traps_stops_nothing(pair: Pair) -> None:
    guest, host = pair
    (guest.run_dir / "after-restore.d").mkdir(parents=True)
    (guest.run_dir / "incarnation").mkdir()
    os.mkfifo(guest.run_dir / "environment")
    os.mkfifo(guest.run_dir / ".entropy.new")
    (guest.run_dir / "after-restore.d" / "directory").mkdir()
    os.mkfifo(guest.run_dir / "after-restore.d" / "fifo")
    (guest.run_dir / "after-restore.d" / "nowhere").symlink_to("/no/such")
    host.restored(2, b"A=1\0")
    assert host.expect(ALIVE).arg == 2
    assert (guest.run_dir / "entropy").read_bytes() == bytes(64)


def test_answers_come_by_event_and_not_by_the_clock(pair: Pair) -> None:
    """Two hundred rounds take a second; with a 50 ms timer they would take ten."""
    guest, host = pair
    for number in range(200):
        host.ping(number)
    host.send(0x7F)  # of a later version
    host.close()
    host = guest.connect_host()
    host.hello()
    host.ping()
    assert [frame.type for frame in host.frames if frame.type in (PONG, STATUS)] == []


def test_init_neither_ends_nor_spins_while_the_host_is_away(pair: Pair) -> None:
    guest, host = pair
    shell(host, "exec sleep 1000")
    host.close()
    before = guest.cpu_ticks()
    with pytest.raises(subprocess.TimeoutExpired):
        guest.process.wait(1)
    assert guest.cpu_ticks() - before < 5
    host = guest.connect_host()
    assert host.hello().phase == 1


def test_agent_that_is_never_still_does_not_hide_the_host_that_returns(pair: Pair) -> None:
    guest, host = pair
    flood = f"""if True:
        import socket
        client = socket.create_connection(("127.0.0.1", {guest.ports[0]}))
        client.recv(1)
        print("flooding", flush=True)
        while True: client.send(bytes(1000))
    """
    assert host.start([sys.executable, "-S", "-E", "-c", flood]).arg == 0
    host.send(FIN, host.expect(OPEN).stream, 0)
    wait_for_output(host, b"flooding\n")
    host.close()
    for _ in range(3):
        host = guest.connect_host()
        assert host.hello().phase == 1
        host.close()


def test_unusable_command_line_is_refused(binary: Path) -> None:
    for options in (["--nonsense", "1"], ["--listen"], ["--listen", "x:1"], ["--listen", "127.0.0.1:65536"],
                    ["--total-bytes-max", "-1"], ["--request-bytes-max", "1k"]):  # fmt: skip
        ended = subprocess.run([str(binary), *options], stdin=subprocess.DEVNULL, capture_output=True, check=False)
        assert (ended.returncode, ended.stdout, b"usage" in ended.stderr) == (2, b"", True), options


def test_port_that_is_taken_ends_init_at_once(binary: Path, tmp_path: Path) -> None:
    with running(binary, tmp_path) as (first, _):
        second = tmp_path / "second"
        second.mkdir()
        guest = launch(binary, second, "--listen", f"127.0.0.1:{first.ports[0]}")
        guest.hosts[0].close()
        assert guest.process.wait(10) == 1
        assert "cannot listen" in (second / "stderr").read_text()


def test_frames_of_another_link_and_damaged_ones_are_dropped(pair: Pair) -> None:
    guest, host = pair
    shell(host, "while :; do sleep 1; done")
    before = host.hello().dropped_frames
    nonce, host.nonce = host.nonce, 99
    host.send(SIGNAL, signal.SIGKILL, 1)
    host.nonce = nonce
    wire = bytearray(host.wire(SIGNAL, signal.SIGKILL, 1))
    wire[9] ^= 0xFF
    host.write(bytes(wire))
    host.write(b"\0\0" + b"half a frame\0" + b"x" * 100_000 + b"\0")
    status = host.hello()
    assert (status.dropped_frames - before, status.last_signal_id) == (4, 0)
    with connect(guest):
        host.expect(0x82)
    host.send(FIN, 4711, 1)
    host.ping()
    host.send(SIGNAL, signal.SIGKILL, 1)
    assert exit_status(host) == signal.SIGKILL


def test_frame_that_arrives_byte_by_byte_is_taken(pair: Pair) -> None:
    _, host = pair
    for byte in host.wire(0x0D, 0, 5):
        host.write(bytes([byte]))
    assert host.expect(PONG).arg == 5
    host.send(0x01, 0, 1)
    assert parse_status(host.expect(STATUS).payload).phase == 0
