"""Speaks to a running sandbox's kernel over runsc's control socket, where the command's start-up would dominate.

One JSON request and one JSON answer a connection, files passed as SCM_RIGHTS. Only for the versions in
`CONTROL_VERSIONS`, whose method names and arguments were read in gVisor's source at that release.
"""

import array
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

from torpor.core.errors import SandboxFailed

CONTROL_VERSIONS = frozenset({"0.0~20240729.0", "release-20240729.0"})

LOOPBACK_LINKS: dict[str, Any] = {
    "LoopbackLinks": [
        {
            "Name": "lo",
            "Addresses": [{"Address": "127.0.0.1", "PrefixLen": 8}, {"Address": "::1", "PrefixLen": 128}],
            "Routes": [
                {"Destination": {"IP": "127.0.0.0", "Mask": "/wAAAA=="}},
                {"Destination": {"IP": "::1", "Mask": "/////////////////////w=="}},
            ],
        }
    ]
}
"""What `--network none` gives a sandbox: a loopback interface and nothing else."""


def control_call(
    socket_path: str, method: str, argument: object = None, files: Sequence[int] = (), *, deadline_seconds: float
) -> Any:
    """Call one method of the sandbox's kernel; blocks.

    Raises:
        SandboxFailed: `sandbox_gone` when nobody answers, `sandbox_refused` with the kernel's own words.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(deadline_seconds)
        try:
            _connect(connection, socket_path)
            request = json.dumps({"method": method, "arg": argument}).encode()
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
            connection.sendmsg([request], rights)
            answer = _read_object(connection)
        except (OSError, ValueError) as error:
            raise SandboxFailed("sandbox_gone", f"cannot call {method} of the sandbox: {error}") from error
    if not answer.get("success"):
        raise SandboxFailed("sandbox_refused", f"cannot call {method} of the sandbox: {answer.get('err', 'no reason')}")
    return answer.get("result")


def answers(socket_path: str, *, deadline_seconds: float = 1.0) -> bool:
    """Somebody accepts connections on the control socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(deadline_seconds)
        try:
            _connect(connection, socket_path)
        except OSError:
            return False
    return True


def _connect(connection: socket.socket, path: str) -> None:
    """Connect through the open directory: TORPOR_HOME may lie deeper than a socket address is long."""
    directory, _, name = path.rpartition("/")
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{descriptor}/{name}")
    finally:
        os.close(descriptor)


def _read_object(connection: socket.socket) -> dict[str, Any]:
    """The answer has no length in front: it is complete when it parses."""
    received = b""
    while True:
        piece = connection.recv(65536)
        if not piece:
            raise ValueError("the connection closed before the answer was complete")
        received += piece
        try:
            return json.loads(received)
        except ValueError:
            continue
