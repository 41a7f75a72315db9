"""Azure's own emulator of its blob storage, from npm in its pinned version, on loopback, in a directory of its own."""

import base64
import fcntl
import hashlib
import hmac
import http.client
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

from tests.e2e.clients.npm import NpmProgram
from tests.seaweedfs import die_with_parent, free_ports

from torpor.config import Secret, StoreSettings
from torpor.core.clock import SystemClock
from torpor.snapshots.backend import Backend, open_backend

PROGRAM = NpmProgram(package="azurite", version="3.37.0", pattern="azurite/dist/src/blob/main.js")
ACCOUNT, CONTAINER = "torportest", "snapshots"
KEY = base64.b64encode(b"the key of torpor's test").decode()
API_VERSION = "2021-08-06"


class Azurite:
    """A running server with one container in it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"

    def backend(self, path: str) -> Backend:
        """A store at `CONTAINER/PREFIX`."""
        settings = StoreSettings(url=f"az://{ACCOUNT}/{path}", endpoint=self.endpoint, retry_seconds=20)
        return open_backend(settings, lambda: Secret(KEY), clock=SystemClock())

    def make_container(self) -> None:
        dated = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": API_VERSION}
        headers = "".join(f"{name}:{value}\n" for name, value in dated.items())
        # Eleven headers that may be signed, of which this request has none.
        signed = "PUT\n" + 11 * "\n" + headers + f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
        signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), signed.encode(), hashlib.sha256)).decode()
        asked = http.client.HTTPConnection("127.0.0.1", self._port)
        dated["Authorization"] = f"SharedKey {ACCOUNT}:{signature}"
        asked.request("PUT", f"/{ACCOUNT}/{CONTAINER}?restype=container", headers=dated)
        answer = asked.getresponse()
        assert answer.status == 201, answer.read()
        asked.close()


@contextmanager
def azurite(directory: Path) -> Iterator[Azurite]:
    """Raises NotInstallable: there is no npm, or the registry does not give it."""
    with _one_at_a_time():
        program = PROGRAM.path()
    [port] = free_ports(1)
    options = {"blobHost": "127.0.0.1", "blobPort": str(port), "location": str(directory)}
    process = subprocess.Popen(
        [
            *("node", str(program), "--skipApiVersionCheck", "--disableTelemetry"),
            *(word for name, value in options.items() for word in (f"--{name}", value)),
        ],
        env={**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    assert process.stdout is not None
    try:
        assert any("successfully listens" in line for line in process.stdout), "Azurite ended at once"
        server = Azurite(port)
        server.make_container()
        yield server
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """It is large: the workers of one test run should not all fetch it."""
    PROGRAM.directory.parent.mkdir(exist_ok=True)
    with PROGRAM.directory.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
