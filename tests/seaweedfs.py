"""A real S3 server for tests: SeaweedFS, on loopback, in its own directory, gone with the process that started it."""

import ctypes
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from torpor.config import Secret, StoreSettings
from torpor.core.clock import SystemClock
from torpor.snapshots.backend import Backend, open_backend

KEY_ID, KEY = "torpor-test", "the-secret-of-torpor-test"
OPEN_BUCKET = "open-to-all"
"""A bucket that answers requests without a signature."""
START_SECONDS = 90
SERVERS = ("master", "volume", "filer", "s3")
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class SeaweedFS:
    """One server, all of it in one process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._data = directory / "data"
        self._data.mkdir(parents=True)
        self._ports = dict(zip(_port_names(), free_ports(len(_port_names())), strict=True))
        self._config = directory / "identities.json"
        anyone = [f"{action}:{OPEN_BUCKET}" for action in ("Read", "Write", "List")]
        us = {"accessKey": KEY_ID, "secretKey": KEY}
        identities = [
            {"name": "torpor", "credentials": [us], "actions": ["Admin", "Read", "Write", "List"]},
            {"name": "anonymous", "actions": anyone},
        ]
        self._config.write_text(json.dumps({"identities": identities}))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3.port']}"

    def start(self) -> None:
        """Start it, with what it had before; returns when it stores objects."""
        options = {f"{name}": str(port) for name, port in self._ports.items()} | {
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "dir": str(self._data),
            "filer": "true",
            "filer.localSocket": str(self.directory / "filer.sock"),
            "s3": "true",
            "s3.config": str(self._config),
            "s3.iam": "false",
            "s3.port.iceberg": "0",
            "s3.port.lance": "0",
            "s3.localSocket": str(self.directory / "s3.sock"),
            "master.electionTimeout": "1s",
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": "256",
            "volume.max": "64",
            "volume.preStopSeconds": "0",
        }
        weed = Path(sys.executable).parent / "weed"
        with (self.directory / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                [weed, "-logtostderr=true", "server", *(f"-{name}={value}" for name, value in options.items())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        try:
            # A health request: it is answered once the server has a leader and a volume to write to.
            obstore.put(self._waiting_client(), "ready", b"ready")
        except BaseError as error:
            state = self._process.poll()
            log_end = (self.directory / "weed.log").read_text()[-2000:]
            raise AssertionError(f"SeaweedFS did not start (exit status {state}):\n{log_end}") from error

    def kill(self) -> None:
        """`kill -9`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
        for server in SERVERS:
            # These it puts where it wants.
            Path(f"/tmp/seaweedfs-{server}-grpc-{self._ports[f'{server}.port.grpc']}.sock").unlink(missing_ok=True)

    def settings(
        self, path: str, *, endpoint: str = "", request_seconds: float = 10, retry_seconds: float = 20
    ) -> StoreSettings:
        """Of a store at `BUCKET/PREFIX`; the bucket is made with its first object."""
        return StoreSettings(
            url=f"s3://{path}",
            endpoint=endpoint or self.endpoint,
            region="us-east-1",
            key_id=KEY_ID,
            request_seconds=request_seconds,
            retry_seconds=retry_seconds,
        )

    def backend(self, path: str, **bounds: Any) -> Backend:
        """A store with these settings."""
        settings = self.settings(path, **bounds)
        return open_backend(settings, lambda: Secret(KEY), clock=SystemClock())

    def _waiting_client(self) -> S3Store:
        """One that asks again until a server that is about to start answers."""
        return S3Store(
            OPEN_BUCKET,
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id=KEY_ID,
            secret_access_key=KEY,
            client_options={"allow_http": True},
            retry_config={
                "max_retries": 1000,
                "retry_timeout": timedelta(seconds=START_SECONDS),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(milliseconds=500),
                    "base": 1.5,
                },
            },
        )


@contextmanager
def seaweedfs(directory: Path) -> Iterator[SeaweedFS]:
    server = SeaweedFS(directory)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(directory, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listened on a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _port_names() -> list[str]:
    return [f"{server}.port{kind}" for server in SERVERS for kind in ("", ".grpc")]


def die_with_parent() -> None:
    """For a process that is about to become a server: it does not outlive a test run that is killed."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
