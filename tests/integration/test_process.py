"""Claims of torpor.sandbox.process, with real processes."""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from torpor.core.clock import SystemClock
from torpor.core.errors import MachineUnfit, SandboxFailed, TorporError, UpstreamFailed
from torpor.sandbox.process import Finished, run, run_attached, run_blocking

LONG = "sleep 1000"
CLOCK = SystemClock()


async def shell(script: str, *, deadline_seconds: float = 30, **options) -> Finished:
    return await run(["sh", "-c", script], clock=CLOCK, deadline_seconds=deadline_seconds, **options)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def left_behind() -> Iterator[list[int]]:
    """Processes that a test leaves behind on purpose."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


async def test_output_and_status_come_back() -> None:
    finished = await shell("cat; echo out; echo err >&2; exit 3", check=False)
    assert (finished.exit_status, finished.stdout, finished.stderr) == (3, b"out\n", b"err\n")
    assert finished.argv[0] == "sh"
    assert 0 < finished.seconds < 30


async def test_nothing_of_this_environment_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "precious")
    finished = await run(["env"], clock=CLOCK, deadline_seconds=30, env={"MORE": "1"})
    names = {line.split("=")[0] for line in finished.stdout.decode().splitlines()}
    assert names == {"PATH", "HOME", "LANG", "MORE"}


async def test_no_core_is_dumped_and_no_descriptor_leaks() -> None:
    leak = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leak, True)
    try:
        finished = await shell("ulimit -c; ls -l /proc/self/fd")
    finally:
        os.close(leak)
    limit, *listing = finished.stdout.decode().splitlines()
    assert limit == "0"
    assert not any(f" {leak} -> " in line for line in listing)


async def test_a_process_is_not_in_our_group() -> None:
    finished = await shell("ps -o pgid= -p $$; echo $$")
    group, pid = finished.stdout.split()
    assert group == pid


async def test_a_failure_is_explained_and_can_be_replayed() -> None:
    with pytest.raises(UpstreamFailed) as failed:
        await shell("seq 1 9 >&2; exit 4", failure=UpstreamFailed)
    assert failed.value.code == "command_failed"
    assert str(failed.value) == "cannot run sh: exit status 4: 5 | 6 | 7 | 8 | 9"
    assert failed.value.hint == "The command was: sh -c 'seq 1 9 >&2; exit 4'"


async def test_a_killing_signal_is_named() -> None:
    with pytest.raises(SandboxFailed, match="killed by SIGSEGV"):
        await shell("kill -SEGV $$")


async def test_a_missing_program_is_the_machines_fault(tmp_path: Path) -> None:
    with pytest.raises(MachineUnfit, match="No such file") as failed:
        await run([str(tmp_path / "runsc")], clock=CLOCK, deadline_seconds=30)
    assert failed.value.code == "program_missing"
    with pytest.raises(MachineUnfit, match="Permission denied"):
        await run([str(tmp_path)], clock=CLOCK, deadline_seconds=30)


async def test_the_deadline_kills_the_whole_group(tmp_path: Path) -> None:
    with pytest.raises(SandboxFailed, match=r"did not end within 1 s: so far") as failed:
        await shell(f"echo so far >&2; {LONG} & echo $! > {tmp_path}/child; {LONG}", deadline_seconds=1)
    assert failed.value.code == "command_too_slow"
    child = int((tmp_path / "child").read_text())
    while is_alive(child):
        await asyncio.sleep(0)


async def test_a_cancelled_caller_leaves_no_process_behind() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(shell(f"echo $$ >&0; {LONG}", stdin=theirs.fileno()))
            pid = int(await asyncio.get_running_loop().sock_recv(ours, 100))
            running.cancel()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_descendant_that_keeps_the_output_open_is_not_waited_for(left_behind: list[int]) -> None:
    finished = await shell(f"setsid {LONG} & echo $!")
    left_behind.append(int(finished.stdout))
    assert is_alive(left_behind[0])


async def test_an_attached_program_has_the_given_stdio(tmp_path: Path, left_behind: list[int]) -> None:
    into, given_stdin = (tmp_path / name for name in ("out", "in"))
    given_stdin.write_text("given\n")
    (tmp_path / "stderr").write_text("before\n")
    with given_stdin.open("rb") as stdin, into.open("wb") as stdout:
        finished = await run_attached(
            ["sh", "-c", f"cat; echo said >&2; setsid {LONG} & echo $!"],
            clock=CLOCK,
            deadline_seconds=30,
            stdin_fd=stdin.fileno(),
            stdout_fd=stdout.fileno(),
            stderr_path=tmp_path / "stderr",
        )
    word, pid = into.read_text().split()
    left_behind.append(int(pid))
    assert word == "given"
    assert finished.stderr == b"said\n"
    assert (tmp_path / "stderr").read_text() == "before\nsaid\n"


def test_a_blocking_run_does_the_same() -> None:
    finished = run_blocking(["sh", "-c", "echo out; exit 2"], clock=CLOCK, deadline_seconds=30, check=False)
    assert (finished.exit_status, finished.stdout) == (2, b"out\n")
    with pytest.raises(MachineUnfit, match="exit status 2"):
        run_blocking(["sh", "-c", "exit 2"], clock=CLOCK, deadline_seconds=30)
    begun = time.monotonic()
    with pytest.raises(TorporError, match="did not end"):
        run_blocking(["sh", "-c", LONG], clock=CLOCK, deadline_seconds=0.1)
    assert time.monotonic() - begun < 30


async def test_the_command_line_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="torpor.sandbox.process"):
        await run([sys.executable, "-c", "print('a b')"], clock=CLOCK, deadline_seconds=30)
    assert any("-c 'print('\"'\"'a b'\"'\"')'" in record.getMessage() for record in caplog.records)


async def test_very_much_output_is_bounded() -> None:
    finished = await shell("head -c 20000000 /dev/zero")
    assert len(finished.stdout) == 16 * 1024 * 1024
