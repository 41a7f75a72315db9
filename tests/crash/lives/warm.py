"""Torpor commands that start in a moment: each is a process of its own, forked from one that has imported everything.

A command is the same as `python -m torpor ...` from there on: own environment, own output, may be killed, may become
the node daemon. Importing is most of what a command takes, and a test of a thousand kills runs tens of thousands.

The server is this file as a program; it listens on a Unix socket, one connection a command. It answers with the
process's id, then, when that has ended, with how.
"""

import gc
import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NOT_IMPORTED = ("torpor.testing", "torpor.__main__", "torpor.agent", "torpor.sdk", "torpor.snapshots.object_store")
REQUEST_BYTES_MAX = 1 << 20
PATIENCE_SECONDS = 240.0


class Command:
    """A process of the server's."""

    def __init__(self, connection: socket.socket, output: Any) -> None:
        connection.settimeout(PATIENCE_SECONDS)
        self._connection = connection
        self._lines = connection.makefile("r")
        self._output = output
        self.pid = int(self._lines.readline())
        self.status: int | None = None

    def wait(self) -> int:
        """Its exit status, negative for the signal that killed it.

        Raises:
            TimeoutError: it does not end.
        """
        if self.status is None:
            self.status = int(self._lines.readline())
            self._forget()
        return self.status

    def kill(self) -> None:
        """As `kill -9`; who has ended meanwhile is left to its status."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def close(self) -> None:
        """Ask no more how it ends, and forget what it wrote."""
        self._forget()
        self._output.close()

    def _forget(self) -> None:
        self._lines.close()
        self._connection.close()

    def text(self) -> str:
        """What it wrote, stdout and stderr."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")


class Server:
    """Starts commands in a directory, with an environment of their own."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "warm"
        command = [sys.executable, __file__, str(self._path)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def start(
        self, argv: Sequence[str], *, environment: Mapping[str, str], cwd: Path, output: Any, errors: Any = None
    ) -> Command:
        """Start `torpor ARGV`, with its output in an open file; stderr goes to another one if there is one."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._path))
        request = {"argv": list(argv), "environment": dict(environment), "cwd": str(cwd)}
        socket.send_fds(connection, [json.dumps(request).encode()], [output.fileno(), (errors or output).fileno()])
        return Command(connection, output)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def serve(path: str) -> None:
    """Be the server, until somebody kills it."""
    import torpor

    for module in pkgutil.walk_packages(torpor.__path__, "torpor."):
        if not module.name.startswith(NOT_IMPORTED):
            importlib.import_module(module.name)
    assert threading.active_count() == 1, "a process with threads can't be forked"
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(16)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _attend(connection)
        connection.close()


def _attend(connection: socket.socket) -> None:
    """Run one command, and tell how it ended."""
    data, descriptors, _, _ = socket.recv_fds(connection, REQUEST_BYTES_MAX, 2)
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(json.loads(data), descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    try:
        connection.sendall(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    finally:
        os._exit(0)


def _become(request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    from torpor.cli.main import main

    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in zip((null, *descriptors), (0, 1, 2), strict=True):
        os.dup2(descriptor, place)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = ["torpor", *request["argv"]]
    status = 1
    try:
        main()
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
