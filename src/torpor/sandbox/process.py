"""The only place that starts a subprocess: logged argv, explicit environment, bounded time, explained exit.

Output goes to files in memory, never to pipes: a sandbox that `runsc` leaves behind keeps its output open for
hours, and whoever waits for a pipe's end waits with it. Every process gets its own session: Ctrl-C does not
reach it, and its whole group can be killed; a sandbox that left the group is the caller's to delete.
"""

import asyncio
import logging
import os
import resource
import shlex
import signal
import subprocess
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torpor.core.clock import Clock
from torpor.core.errors import MachineUnfit, SandboxFailed, TorporError

logger = logging.getLogger(__name__)

BASE_ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/nonexistent",
    "LANG": "C.UTF-8",
}
"""All that a process gets unless its caller says more: this node's own environment holds keys."""

OUTPUT_BYTES_MAX = 16 * 1024 * 1024
"""More output than this is not read back."""
_TAIL_LINES = 5
_TAIL_CHARACTERS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A process that ended.

    Attributes:
        exit_status: negative for the signal that killed it.
    """

    argv: tuple[str, ...]
    exit_status: int
    stdout: bytes
    stderr: bytes
    seconds: float

    def explain(self) -> str:
        """How it ended, in words, with the last lines of its stderr."""
        if self.exit_status >= 0:
            ending = f"exit status {self.exit_status}"
        else:
            ending = f"killed by {_signal_name(-self.exit_status)}"
        return f"{ending}{_tail(self.stderr)}"


async def run(
    argv: Sequence[str],
    *,
    clock: Clock,
    deadline_seconds: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int | None = None,
    check: bool = True,
    failure: type[TorporError] = SandboxFailed,
) -> Finished:
    """Run a program to its end and keep its output.

    Args:
        env: added to BASE_ENVIRONMENT.
        stdin: a descriptor; None is /dev/null.
        failure: what to raise when the program is too slow, or when `check` is set and it fails.

    Raises:
        MachineUnfit: ("program_missing") it can't be executed.
        TorporError: of class `failure`, "command_too_slow" (its group was killed) or "command_failed".
    """
    with _memory_file() as stdout, _memory_file() as stderr:
        begun = clock.monotonic()
        process = _start(argv, env=env, cwd=cwd, stdin=stdin, stdout=stdout, stderr=stderr)
        in_time = await _wait(process, deadline_seconds)
        finished = _finished(argv, process, begun, clock, _content(stdout), _content(stderr))
    return _checked(finished, deadline_seconds, in_time=in_time, check=check, failure=failure)


async def run_attached(
    argv: Sequence[str],
    *,
    clock: Clock,
    deadline_seconds: float,
    stdin_fd: int,
    stdout_fd: int,
    stderr_path: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
    failure: type[TorporError] = SandboxFailed,
) -> Finished:
    """Like `run`, for a program that leaves a sandbox behind with its stdio: `runsc create`, `restore`.

    Both descriptors stay the caller's to close. `stderr` of the result is what was appended to `stderr_path`.
    """
    with _appended(stderr_path) as stderr:
        before = os.fstat(stderr).st_size
        begun = clock.monotonic()
        process = _start(argv, env=env, cwd=cwd, stdin=stdin_fd, stdout=stdout_fd, stderr=stderr)
        in_time = await _wait(process, deadline_seconds)
        finished = _finished(argv, process, begun, clock, b"", _content(stderr, before))
    return _checked(finished, deadline_seconds, in_time=in_time, check=check, failure=failure)


def run_blocking(
    argv: Sequence[str],
    *,
    clock: Clock,
    deadline_seconds: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int | None = None,
    check: bool = True,
    failure: type[TorporError] = MachineUnfit,
) -> Finished:
    """`run` for code without an event loop: `torpor doctor`, set-up, and threads."""
    with _memory_file() as stdout, _memory_file() as stderr:
        begun = clock.monotonic()
        process = _start(argv, env=env, cwd=cwd, stdin=stdin, stdout=stdout, stderr=stderr)
        in_time = _wait_blocking(process, deadline_seconds)
        finished = _finished(argv, process, begun, clock, _content(stdout), _content(stderr))
    return _checked(finished, deadline_seconds, in_time=in_time, check=check, failure=failure)


def start_daemon(argv: Sequence[str], log: Path, is_ready: Callable[[], bool], *, deadline_seconds: float = 30) -> bool:
    """Start a process that outlives this one, with its output in `log`; True once it is ready, False if it ended first.

    It inherits the whole environment: a node of one's own needs the same keys and settings.
    """
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with log.open("ab") as output:
        child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, close_fds=True
        )
    for _ in range(round(deadline_seconds / 0.05)):
        try:
            child.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            if is_ready():
                return True
            continue
        return child.returncode == 0
    child.kill()
    return False


def cpu_seconds_below(pid: int) -> float | None:
    """Processor time of all that a process has started and that still runs, and of theirs; None: it is gone."""
    try:
        children = [child for task in os.scandir(f"/proc/{pid}/task") for child in _children(task.path)]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return sum(_cpu_seconds(child) + (cpu_seconds_below(child) or 0.0) for child in children)


def bytes_of_open_file(pid: int, name: str) -> int | None:
    """What an open file of a process takes, by the beginning of its name; None: there is none, or it is not ours."""
    with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            if Path(entry.path).readlink().as_posix().startswith(name):
                return Path(entry.path).stat().st_blocks * 512
    return None


def _cpu_seconds(pid: int) -> float:
    """In user mode and in the kernel, and that of children that ended; nothing if it is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _children(task: str) -> list[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        return list(map(int, Path(task, "children").read_text().split()))
    return []


def _start(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None,
    cwd: Path | None,
    stdin: int | None,
    stdout: int,
    stderr: int,
) -> "subprocess.Popen[bytes]":
    logger.debug("run: %s", shlex.join(argv))
    # Inherited, not set between fork and exec, where our code could deadlock in a process with threads.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=stdout,
            stderr=stderr,
            env={**BASE_ENVIRONMENT, **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )
    except OSError as error:
        raise MachineUnfit(
            "program_missing",
            f"cannot run {argv[0]}: {error.strerror or error} ({error.filename})",
            hint="`torpor doctor` looks for everything that Torpor needs.",
        ) from error


async def _wait(process: "subprocess.Popen[bytes]", deadline_seconds: float) -> bool:
    """Wait for the end; False when it had to be brought about. A cancelled caller leaves nothing behind."""
    try:
        async with asyncio.timeout(deadline_seconds):
            await _ended(process)
    except BaseException as error:
        _kill_group(process)
        await _ended(process)
        process.wait()
        if not isinstance(error, TimeoutError):
            raise
        return False
    process.wait()
    return True


def _wait_blocking(process: "subprocess.Popen[bytes]", deadline_seconds: float) -> bool:
    try:
        process.wait(deadline_seconds)
    except BaseException as error:
        _kill_group(process)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return False
    return True


async def _ended(process: "subprocess.Popen[bytes]") -> None:
    """Wait without a thread, and without reaping: until then the process id can't be another's."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    descriptor = os.pidfd_open(process.pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _finished(
    argv: Sequence[str],
    process: "subprocess.Popen[bytes]",
    begun: float,
    clock: Clock,
    stdout: bytes,
    stderr: bytes,
) -> Finished:
    finished = Finished(
        argv=tuple(argv),
        exit_status=process.returncode,
        stdout=stdout,
        stderr=stderr,
        seconds=clock.monotonic() - begun,
    )
    logger.debug("ended: %s after %.3f s: %s", argv[0], finished.seconds, finished.explain())
    return finished


def _checked(
    finished: Finished, deadline_seconds: float, *, in_time: bool, check: bool, failure: type[TorporError]
) -> Finished:
    name = Path(finished.argv[0]).name
    hint = f"The command was: {shlex.join(finished.argv)}"
    if not in_time:
        reason = f"it did not end within {deadline_seconds:g} s{_tail(finished.stderr)}"
        raise failure("command_too_slow", f"cannot run {name}: {reason}", hint=hint)
    if check and finished.exit_status != 0:
        raise failure("command_failed", f"cannot run {name}: {finished.explain()}", hint=hint)
    return finished


@contextmanager
def _memory_file() -> Generator[int, None, None]:
    descriptor = os.memfd_create("output", os.MFD_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _appended(path: Path) -> Generator[int, None, None]:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _content(descriptor: int, start: int = 0) -> bytes:
    size = min(os.fstat(descriptor).st_size - start, OUTPUT_BYTES_MAX)
    return os.pread(descriptor, max(size, 0), start)


def _tail(stderr: bytes) -> str:
    lines = [line.strip() for line in stderr[-4 * _TAIL_CHARACTERS :].decode("utf-8", "replace").splitlines()]
    last = " | ".join([line for line in lines if line][-_TAIL_LINES:])[-_TAIL_CHARACTERS:]
    return f": {last}" if last else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
