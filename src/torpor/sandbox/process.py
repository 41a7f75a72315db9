"""The only place that starts a subprocess: logged argv, bounded time, explicit environment, explained exit.

Output goes to files, never to pipes: `runsc create --detach` leaves a grandchild that keeps its stdio open for ever.
"""

import asyncio
import contextlib
import logging
import os
import resource
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from torpor.core.clock import Clock
from torpor.core.errors import MachineUnfit, SandboxFailed

logger = logging.getLogger(__name__)

ENVIRONMENT_KEPT = ("PATH", "HOME", "TMPDIR", "XDG_RUNTIME_DIR")
"""Nothing else of this process's environment reaches a child: it may hold keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A command that ended.

    Attributes:
        exit_status: as a shell gives it, 128 + n for signal n.
    """

    argv: tuple[str, ...]
    exit_status: int
    stdout: bytes
    stderr: bytes
    seconds: float


async def run(
    argv: Sequence[str],
    *,
    deadline_seconds: float,
    clock: Clock,
    check: bool = True,
    cwd: Path | None = None,
    stdin: int | None = None,
) -> Finished:
    """Run a command to its end.

    Raises:
        SandboxFailed: `command_failed` (with `check`) or `command_timed_out`; its whole process group is dead then.
        MachineUnfit: `command_missing`.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        return await _run(argv, out, err, stdin, deadline_seconds=deadline_seconds, clock=clock, check=check, cwd=cwd)


async def run_attached(
    argv: Sequence[str], *, stdin_fd: int, stdout_fd: int, stderr_path: Path, deadline_seconds: float, clock: Clock
) -> Finished:
    """Run a command whose detached child keeps the given descriptors as its stdin and stdout."""
    with os.fdopen(os.dup(stdout_fd), "wb") as out, stderr_path.open("a+b") as err:
        return await _run(
            argv, out, err, stdin_fd, deadline_seconds=deadline_seconds, clock=clock, check=True, cwd=None
        )


def run_blocking(
    argv: Sequence[str], *, deadline_seconds: float, clock: Clock, check: bool = True, cwd: Path | None = None
) -> Finished:
    """`run` for set-up code that has no event loop."""
    return asyncio.run(run(argv, deadline_seconds=deadline_seconds, clock=clock, check=check, cwd=cwd))


async def _run(
    argv: Sequence[str],
    out: IO[bytes],
    err: IO[bytes],
    stdin: int | None,
    *,
    deadline_seconds: float,
    clock: Clock,
    check: bool,
    cwd: Path | None,
) -> Finished:
    logger.debug("run: %s", shlex.join(argv))
    started = clock.monotonic()
    err_from = os.fstat(err.fileno()).st_size
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=out,
            stderr=err,
            cwd=cwd,
            env=_environment(os.environ),
            start_new_session=True,
            preexec_fn=_no_core_dumps,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise MachineUnfit(
            "command_missing", f"cannot run {argv[0]}: {error.strerror}", hint="Run `torpor doctor`."
        ) from error
    try:
        async with asyncio.timeout(deadline_seconds):
            code = await process.wait()
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await asyncio.shield(process.wait())
        if isinstance(error, TimeoutError):
            raise SandboxFailed(
                "command_timed_out", f"cannot finish `{_short(argv)}`: it took more than {deadline_seconds:.0f} s"
            ) from error
        raise
    finished = Finished(
        argv=tuple(argv),
        exit_status=code if code >= 0 else 128 - code,
        stdout=_content(out, 0),
        stderr=_content(err, err_from),
        seconds=clock.monotonic() - started,
    )
    if check and code != 0:
        raise SandboxFailed("command_failed", f"cannot finish `{_short(argv)}`: {explain(finished)}")
    return finished


def explain(finished: Finished) -> str:
    """Why a command failed, in its own last words."""
    words = finished.stderr.decode(errors="replace").strip().splitlines()
    ended = f"exit status {finished.exit_status}"
    if finished.exit_status > 128:
        with contextlib.suppress(ValueError):
            ended = f"killed by {signal.Signals(finished.exit_status - 128).name}"
    return f"{ended}: {words[-1]}" if words else ended


def _content(file: IO[bytes], start: int) -> bytes:
    """What was written to a regular file; a FIFO or a terminal has nothing to read back."""
    try:
        return os.pread(file.fileno(), 1 << 24, start)
    except OSError:
        return b""


def _environment(own: Mapping[str, str]) -> dict[str, str]:
    kept = {name: own[name] for name in ENVIRONMENT_KEPT if name in own}
    return {"LANG": "C.UTF-8", **kept}


def _no_core_dumps() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _short(argv: Sequence[str]) -> str:
    return shlex.join([Path(argv[0]).name, *(word for word in argv[1:] if not word.startswith("-"))])


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
