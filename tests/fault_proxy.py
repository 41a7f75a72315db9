"""A TCP proxy before an HTTP server that breaks what passes through it, in the ways that networks and servers do.

It reads requests and answers as HTTP/1.1, passes them on byte for byte, and does to some what its rules say. All of it
is real: connections are reset, bodies end half-way, the port refuses connections.
"""

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO
from urllib.parse import urlsplit

PIECE_BYTES = 16 * 1024
SILENCE_SECONDS = 60


class Fault(StrEnum):
    REFUSE = "refuse"
    """A status and body of the rule's, without asking the server."""
    RESET = "reset"
    """The connection is reset when the request is there; the server never hears of it."""
    TEAR_UPLOAD = "tear_upload"
    """Half of the request's body reaches the server, then both connections are reset."""
    LOSE_ANSWER = "lose_answer"
    """The server does what it was asked for, and its answer is lost."""
    TEAR_ANSWER = "tear_answer"
    """Half of the answer's body arrives, then the connection is reset."""
    SILENT = "silent"
    """The request is taken, nothing comes back."""
    SLOW = "slow"
    """Bodies trickle in both directions."""
    STRIP_CONDITION = "strip_condition"
    """`If-None-Match` is left out, as by a server that ignores it."""
    STALE = "stale"
    """The first answer to the same request line, once more: a listing that does not show yet what has changed."""
    MEET = "meet"
    """The request waits until `meet` of them are there; if they never are, it is reset."""


@dataclass(slots=True, kw_only=True)
class Rule:
    """Which requests a fault strikes.

    Attributes:
        contains: part of the request's path and query.
        times: how many requests it strikes; None = all.
    """

    fault: Fault
    method: str = ""
    contains: str = ""
    times: int | None = None
    status: int = 503
    body: bytes = b""
    piece_seconds: float = 0.01
    meet: int = 2


@dataclass(frozen=True, slots=True)
class Message:
    """A request or an answer, whole."""

    head: bytes
    body: bytes

    @property
    def line(self) -> str:
        return self.head.split(b"\r\n", 1)[0].decode()

    @property
    def method(self) -> str:
        return self.line.split(" ")[0]

    @property
    def path(self) -> str:
        return self.line.split(" ")[1]


class FaultProxy:
    """Listens on a port of its own from `up` to `down`."""

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self._server = parts.hostname, parts.port
        self._port = 0
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._answers: dict[str, Message] = {}
        self._meetings: dict[int, threading.Barrier] = {}
        self._stopped = threading.Event()
        self.requests: list[str] = []
        """Method and path of each request, in order of arrival."""
        self.up()

    def __enter__(self) -> "FaultProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def strike(self, *rules: Rule) -> None:
        """The first rule that fits a request counts."""
        with self._lock:
            self._rules += rules
            self._meetings |= {id(rule): threading.Barrier(rule.meet) for rule in rules}

    def heal(self) -> None:
        """Take all rules back."""
        with self._lock:
            self._rules.clear()

    def up(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        listener.listen(64)
        self._port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def down(self) -> None:
        """The server is gone: what is open is reset, what comes is refused."""
        with self._lock:
            listener, self._listener = self._listener, None
            open_now = list(self._open)
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for one in open_now:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._stopped.set()
        self.down()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(self._server)
        with self._lock:
            self._open |= {client, server}
        try:
            reader, answers = client.makefile("rb"), server.makefile("rb")
            while (request := _read_message(reader)) is not None:
                with self._lock:
                    self.requests.append(f"{request.method} {request.path}")
                self._pass_on(request, client, server, answers)
        except (OSError, _CutError):
            _reset(client)
            _reset(server)
        finally:
            with self._lock:
                self._open -= {client, server}
            client.close()
            server.close()

    def _pass_on(self, request: Message, client: socket.socket, server: socket.socket, answers: BinaryIO) -> None:
        rule = self._rule_for(request)
        fault = rule.fault if rule else None
        seconds = rule.piece_seconds if rule and fault is Fault.SLOW else 0.0
        if rule is not None and fault is Fault.REFUSE:
            body = b"" if request.method == "HEAD" else rule.body
            client.sendall(b"HTTP/1.1 %d No\r\ncontent-length: %d\r\n\r\n%b" % (rule.status, len(body), body))
            return
        if fault is Fault.RESET:
            raise _CutError
        if fault is Fault.SILENT:
            self._stopped.wait(SILENCE_SECONDS)
            raise _CutError
        if rule is not None and fault is Fault.MEET:
            try:
                self._meetings[id(rule)].wait(SILENCE_SECONDS)
            except threading.BrokenBarrierError:
                raise _CutError from None
        if fault is Fault.STALE and request.line in self._answers:
            answer = self._answers[request.line]
            client.sendall(answer.head + answer.body)
            return
        head = _without_condition(request.head) if fault is Fault.STRIP_CONDITION else request.head
        server.sendall(head)
        if fault is Fault.TEAR_UPLOAD:
            server.sendall(request.body[: len(request.body) // 2])
            raise _CutError
        self._send(server, request.body, seconds)
        answer = _read_message(answers, is_answer_to=request.method)
        if answer is None or fault is Fault.LOSE_ANSWER:
            raise _CutError
        self._answers.setdefault(request.line, answer)
        client.sendall(answer.head)
        if fault is Fault.TEAR_ANSWER:
            client.sendall(answer.body[: len(answer.body) // 2])
            raise _CutError
        self._send(client, answer.body, seconds)

    def _send(self, to: socket.socket, body: bytes, seconds: float) -> None:
        if not seconds:
            to.sendall(body)
            return
        for start in range(0, len(body), PIECE_BYTES):
            to.sendall(body[start : start + PIECE_BYTES])
            self._stopped.wait(seconds)

    def _rule_for(self, request: Message) -> Rule | None:
        with self._lock:
            for rule in self._rules:
                fits = rule.method in ("", request.method) and rule.contains in request.path
                if fits and rule.times != 0:
                    rule.times = None if rule.times is None else rule.times - 1
                    return rule
        return None


class _CutError(Exception):
    """Both connections end here."""


def _read_message(reader: BinaryIO, *, is_answer_to: str = "") -> Message | None:
    """The next request, or the answer to a method; None at the end of the connection."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = reader.readline()
        if not line:
            return None
        head += line
    status = head.split(b" ", 2)[1] if is_answer_to else b""
    if is_answer_to == "HEAD" or status in (b"204", b"304"):
        return Message(head, b"")
    if re.search(rb"\r\ntransfer-encoding: *chunked", head, re.IGNORECASE):
        return Message(head, b"".join(_chunks(reader)))
    length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    body = reader.read(int(length[1]) if length else 0)
    if length and len(body) < int(length[1]):
        return None
    return Message(head, body)


def _chunks(reader: BinaryIO) -> Iterator[bytes]:
    """A chunked body as it stands, framing included."""
    while True:
        line = reader.readline()
        yield line + reader.read(int(line.split(b";")[0], 16) + 2)
        if int(line.split(b";")[0], 16) == 0:
            return


def _without_condition(head: bytes) -> bytes:
    return re.sub(rb"\r\nif-none-match:[^\r]*", b"", head, flags=re.IGNORECASE)


def _reset(one: socket.socket) -> None:
    """Close with RST, not FIN: nothing that was under way counts as an orderly end."""
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.shutdown(socket.SHUT_RD)
