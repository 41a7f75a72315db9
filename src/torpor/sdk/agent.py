"""Torpor for a Python program inside of a session: wait, ask, send, checkpoint, and do a step once. See docs/sdk.md.

One file for any Python from 3.8 on, which needs nothing but the standard library and keeps no state of its own: every
function is a request to the sandbox's own API, which is a call in the session's log. A connection that ends without an
answer is asked anew, and the gateway joins the two. There is no timeout in here, so that a clock that jumps while the
sandbox sleeps ends no wait: how long is waited is the host's to measure.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import datetime

    Seconds = float | None
    Words = Sequence[str]
    Operation = tuple[str, str, "dict[str, Any] | None", Callable[[Any], Any]]

__all__ = [
    "Answer", "Child", "Ended", "Message", "Refused", "Restored", "Unreachable", "after_restore", "aio", "ask",
    "before_checkpoint", "checkpoint", "context", "effect", "receive", "send", "session", "sleep", "spawn", "wait",
]  # fmt: skip

RUN_DIRECTORY = "/run/torpor"
ATTEMPTS_MAX = 40
PAUSE_SECONDS_MAX = 5.0


class Answer(str):
    """What a person said; `files` are those that came with it, by name."""

    __slots__ = ("files",)

    def __init__(self, _text: str) -> None:
        self.files: dict[str, bytes] = {}


class Message(NamedTuple):
    """What `receive` gives: `number` counts from 1, `sent_at` is ISO 8601, UTC."""

    number: int
    text: str
    sent_at: str


class Child(NamedTuple):
    """A session that `spawn` began; `wait` tells how it ended."""

    session: str
    waitpoint: str


class Ended(NamedTuple):
    """How a child ended: `succeeded`, `failed` or `cancelled`, and its exit status, if its agent had one."""

    status: str
    exit_status: int | None


class Restored(NamedTuple):
    """What a hook of `after_restore` gets: which life of the sandbox this is, and how long there was none."""

    incarnation: int
    slept_seconds: float


class Refused(Exception):
    """Torpor said no. `code` is one of docs/errors.md, `hint` says what to do, `status` is that of HTTP."""

    def __init__(self, status: int, code: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.status, self.code, self.hint = status, code, hint


class Unreachable(Exception):
    """Nobody answers for Torpor: this program does not run in a session, or the answers make no sense."""


def ask(
    question: str, choices: Words = (), *, free_text: bool = False, files: Words = (), timeout: Seconds = None
) -> Answer | None:
    """Ask a person, and wait for the answer, for days if need be.

    Args:
        choices: the answers that there are; none: any text. With `free_text` any text will do although there are some.
        files: what the person should look at, paths in the workspace.
        timeout: seconds, by the host's clock.

    Returns:
        The answer, a choice in its own spelling, with the `files` that came with it; None when it timed out.
    """
    return _call(_ask(question, choices, free_text, files, timeout))


def sleep(seconds: float = 0.0, *, until: datetime | None = None) -> None:
    """Wait for a time by the clock outside; the session may sleep meanwhile. `until`: a datetime with a time zone."""
    return _call(_sleep(seconds, until))


def receive(*, timeout: Seconds = None) -> Message | None:
    """Take the next message to the session (`torpor send`), waiting for it. None when none came within `timeout`."""
    return _call(_receive(timeout))


def send(text: str) -> int:
    """Send a message out, where people read it (`torpor tail`); its number."""
    return _call(_send(text))


def checkpoint() -> int:
    """Save memory, files and connections; returns when that is durable, with the checkpoint's number."""
    return _call(_CHECKPOINT)


def session() -> dict[str, Any]:
    """Who this is: the answer of `GET /torpor/v1/session`, a dict."""
    return _call(_SESSION)


def context() -> dict[str, Any]:
    """What the model saw last, and said: the answer of `GET /torpor/v1/context`, for a program without its memory."""
    return _call(_CONTEXT)


def spawn(
    command: Sequence[str],
    *,
    name: str | None = None,
    workspace: str = ".",
    environment: dict[str, str] | None = None,
    detach: bool = False,
) -> Child:
    """Begin a session of its own, with a copy of the workspace as it is now; it spends the budget of this one.

    Args:
        workspace: the directory of the workspace that becomes its workspace.
        environment: added to that of this session.
        detach: it goes on when this session is cancelled.
    """
    return _call(_spawn(command, name, workspace, environment, detach))


def wait(child: Child, *, timeout: Seconds = None) -> Ended | None:
    """Wait until a child has ended. None when it has not within `timeout`."""
    return _call(_wait(child, timeout))


def effect(name: str, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `step(*args, **kwargs)` unless the log has a result under this name; that result, which JSON can hold.

    A restored agent that comes here again gets the result that is in the log. What ran and was cut off before its
    result was in the log runs again: give the outside an idempotency key if that matters (`name` makes a good one).
    """
    found = _call(_find_effect(name))
    result = found["result"] if found["found"] else step(*args, **kwargs)
    return _call(_record_effect(name, result))


def after_restore(hook: Callable[[Restored], Any]) -> Callable[[Restored], Any]:
    """Have `hook(Restored(...))` run whenever the sandbox was restored, before anything is delivered to the agent.

    It runs in a thread of its own; all hooks together have about 5 seconds. Usable as a decorator.
    """
    _restores.add(lambda incarnation, slept_ns: hook(Restored(incarnation, slept_ns / 1e9)))
    return hook


def before_checkpoint(hook: Callable[[], Any]) -> Callable[[], Any]:
    """Have `hook()` run before a sleep, a stop or a checkpoint that somebody asks for; else as `after_restore`."""
    _checkpoints.add(lambda _incarnation, _slept_ns: hook())
    return hook


class _Aio:
    """The same for asyncio: `await aio.ask(...)`."""

    async def ask(
        self, question: str, choices: Words = (), *, free_text: bool = False, files: Words = (), timeout: Seconds = None
    ) -> Answer | None:
        return await _call_async(_ask(question, choices, free_text, files, timeout))

    async def sleep(self, seconds: float = 0.0, *, until: datetime | None = None) -> None:
        return await _call_async(_sleep(seconds, until))

    async def receive(self, *, timeout: Seconds = None) -> Message | None:
        return await _call_async(_receive(timeout))

    async def send(self, text: str) -> int:
        return await _call_async(_send(text))

    async def checkpoint(self) -> int:
        return await _call_async(_CHECKPOINT)

    async def session(self) -> dict[str, Any]:
        return await _call_async(_SESSION)

    async def context(self) -> dict[str, Any]:
        return await _call_async(_CONTEXT)

    async def spawn(
        self,
        command: Sequence[str],
        *,
        name: str | None = None,
        workspace: str = ".",
        environment: dict[str, str] | None = None,
        detach: bool = False,
    ) -> Child:
        return await _call_async(_spawn(command, name, workspace, environment, detach))

    async def wait(self, child: Child, *, timeout: Seconds = None) -> Ended | None:
        return await _call_async(_wait(child, timeout))

    async def effect(self, name: str, step: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        """As `effect`, of a coroutine function."""
        found = await _call_async(_find_effect(name))
        result = found["result"] if found["found"] else await step(*args, **kwargs)
        return await _call_async(_record_effect(name, result))

    def after_restore(self, hook: Callable[[Restored], Any]) -> Callable[[Restored], Any]:
        """As `after_restore`, of a coroutine function, which runs on the loop that runs now."""
        after_restore(_on_this_loop(hook))
        return hook

    def before_checkpoint(self, hook: Callable[[], Any]) -> Callable[[], Any]:
        """As `before_checkpoint`, of a coroutine function, which runs on the loop that runs now."""
        before_checkpoint(_on_this_loop(hook))
        return hook


def _on_this_loop(hook: Callable[..., Any]) -> Callable[..., Any]:
    import asyncio

    loop = asyncio.get_running_loop()
    return lambda *arguments: asyncio.run_coroutine_threadsafe(hook(*arguments), loop).result(4)


aio = _Aio()

# Each operation is what it asks, and what its answer means: both ways to ask share them.

_CHECKPOINT: Operation = "POST", "checkpoint", {}, lambda answer: answer["checkpoint"]
_SESSION: Operation = "GET", "session", None, lambda answer: answer
_CONTEXT: Operation = "GET", "context", None, lambda answer: answer


def _ask(question: str, choices: Words, free_text: bool, files: Words, timeout: Seconds) -> Operation:
    asked = {"question": question, "choices": list(choices), "free_text": free_text, "files": list(files)}
    return "POST", "ask", {**asked, "timeout_seconds": timeout}, _answer


def _answer(told: Any) -> Answer | None:
    from binascii import a2b_base64

    if told["answer"] is None:
        return None
    answer = Answer(told["answer"])
    for file in told.get("files", ()):
        answer.files[file["name"]] = file["text"].encode() if "text" in file else a2b_base64(file["base64"])
    return answer


def _sleep(seconds: float, until: datetime | None) -> Operation:
    body = {"seconds": seconds, "until": None if until is None else until.isoformat()}
    return "POST", "sleep", body, lambda _: None


def _receive(timeout: Seconds) -> Operation:
    def message(answer: Any) -> Message | None:
        return None if answer["number"] is None else Message(answer["number"], answer["text"], answer["sent_at"])

    return "POST", "receive", {"timeout_seconds": timeout}, message


def _send(text: str) -> Operation:
    return "POST", "send", {"text": text}, lambda answer: answer["number"]


def _spawn(
    command: Sequence[str], name: str | None, workspace: str, environment: dict[str, str] | None, detach: bool
) -> Operation:
    body = {
        "command": list(command),
        "name": name,
        "workspace": workspace,
        "environment": environment or {},
        "on_cancel": "detach" if detach else "cancel",
    }
    return "POST", "spawn", body, lambda answer: Child(answer["session"], answer["waitpoint"])


def _wait(child: Child, timeout: Seconds) -> Operation:
    def ended(answer: Any) -> Ended | None:
        [point] = answer["waitpoints"]
        return Ended(point["status"], point["exit_status"]) if answer["done"] else None

    return "POST", "wait", {"waitpoints": [child.waitpoint], "timeout_seconds": timeout}, ended


def _find_effect(name: str) -> Operation:
    return "POST", "effects/find", {"name": name}, lambda answer: answer


def _record_effect(name: str, result: Any) -> Operation:
    return "POST", "effects", {"name": name, "result": result}, lambda answer: answer["result"]


class _CutOff(Exception):
    """The connection ended before its answer did."""


def _call(operation: Operation) -> Any:
    method, path, body, meaning = operation
    address, request = _address(), _request(method, path, body)
    for attempt in range(ATTEMPTS_MAX):
        time.sleep(_pause(attempt))
        try:
            return meaning(_read(_exchange(address, request)))
        except _CutOff:
            continue
    raise Unreachable("the connection to Torpor was cut off again and again")


async def _call_async(operation: Operation) -> Any:
    import asyncio  # A program that does not use it need not wait for it.

    method, path, body, meaning = operation
    address, request = _address(), _request(method, path, body)
    for attempt in range(ATTEMPTS_MAX):
        await asyncio.sleep(_pause(attempt))
        try:
            return meaning(_read(await _exchange_async(address, request)))
        except _CutOff:
            continue
    raise Unreachable("the connection to Torpor was cut off again and again")


def _pause(attempt: int) -> float:
    return min(PAUSE_SECONDS_MAX, 0.1 * 2**attempt) if attempt else 0


def _address() -> tuple[str, int]:
    host, _, port = os.environ.get("TORPOR_URL", "http://127.0.0.1:4100").rpartition("//")[2].partition(":")
    return host, int(port.rstrip("/") or 80)


def _request(method: str, path: str, body: dict[str, Any] | None) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} /torpor/v1/{path} HTTP/1.1\r\nhost: torpor\r\nconnection: close\r\n"
    if body is not None:
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n"
    return head.encode() + b"\r\n" + content


def _exchange(address: tuple[str, int], request: bytes) -> bytes:
    try:
        with socket.create_connection(address) as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(65536), b""))
    except ConnectionRefusedError as error:
        raise _unreachable(address) from error
    except OSError as error:
        raise _CutOff from error


async def _exchange_async(address: tuple[str, int], request: bytes) -> bytes:
    import asyncio

    try:
        reader, writer = await asyncio.open_connection(*address)
        try:
            writer.write(request)
            return await reader.read(-1)
        finally:
            writer.close()
    except ConnectionRefusedError as error:
        raise _unreachable(address) from error
    except OSError as error:
        raise _CutOff from error


def _unreachable(address: tuple[str, int]) -> Unreachable:
    return Unreachable("nobody listens on {}:{}: does this run in a session of Torpor?".format(*address))


def _read(received: bytes) -> Any:
    """What an answer says, from all bytes of its connection."""
    head, separator, body = received.partition(b"\r\n\r\n")
    if not separator:
        raise _CutOff
    first, *lines = head.decode("latin-1").split("\r\n")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if fields.get("transfer-encoding", "").lower() == "chunked":
        body = _unchunk(body)
    elif len(body) < int(fields.get("content-length", 0)):
        raise _CutOff
    try:
        status, answer = int(first.split(" ")[1]), json.loads(body.decode())
    except (ValueError, IndexError) as error:
        raise Unreachable(f"what answers is not Torpor: {first[:80]!r}") from error
    if not 200 <= status < 300:
        raise Refused(status, answer.get("code", ""), answer.get("message", first), answer.get("hint", ""))
    return answer


def _unchunk(body: bytes) -> bytes:
    pieces: list[bytes] = []
    while True:
        size, separator, body = body.partition(b"\r\n")
        if not separator:
            raise _CutOff
        length = int(size.split(b";")[0], 16)
        if length == 0:
            return b"".join(pieces)
        if len(body) < length + 2:
            raise _CutOff
        pieces.append(body[:length])
        body = body[length + 2 :]


_SCRIPT = """#!/bin/sh
# Init runs this: it tells process {pid}, and waits until its hooks are through.
if [ ! -d /proc/{pid} ]; then rm -f "$0" {told} {done}; exit; fi
echo "$$ ${{TORPOR_INCARNATION:-0}} ${{TORPOR_SLEPT_NS:-0}}" > {told}
while read -r number; do [ "$number" = "$$" ] && exit; done < {done}
"""


class _Hooks:
    """Runs hooks when init runs the programs of one of its directories, and has it wait for them.

    Ours tells a thread of this process through one FIFO, and waits at another for its own number, $$. Both ends are
    open for both directions in here, so that neither side can block on opening one. Init waits for a late hook up to
    its own limit; the line that comes then has a number that nobody waits for any more.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._hooks: list[Callable[[int, int], Any]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, hook: Callable[[int, int], Any]) -> None:
        """`hook` gets the incarnation and how many ns there was none, or zeros."""
        with self._lock:
            self._hooks.append(hook)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, args=self._install(), daemon=True, name="torpor")
                self._thread.start()

    def forget(self) -> None:
        self.__init__(self._directory)

    def _install(self) -> tuple[int, int]:
        pid = os.getpid()
        hooks = os.path.join(RUN_DIRECTORY, self._directory)
        told, done = (f"{RUN_DIRECTORY}/python-{pid}.{self._directory}.{name}" for name in ("told", "done"))
        # 10 to 49 are left for what makes a process's random numbers its own again: hooks may want to draw some.
        script, staged = (f"{hooks}/{dot}50-python-{pid}" for dot in ("", "."))
        if not os.path.isdir(hooks):
            raise Unreachable(f"there is no {hooks}: does this run in a session of Torpor?")
        for path in (told, done):
            if os.path.exists(path):
                os.unlink(path)
            os.mkfifo(path, 0o600)
        ends = os.open(told, os.O_RDWR | os.O_CLOEXEC), os.open(done, os.O_RDWR | os.O_CLOEXEC)
        with open(staged, "w") as file:
            file.write(_SCRIPT.format(pid=pid, told=told, done=done))
        os.chmod(staged, 0o700)
        os.rename(staged, script)
        return ends

    def _run(self, told: int, done: int) -> None:
        with os.fdopen(told, "rb", 0) as lines:
            while True:
                number, incarnation, slept_ns = (int(word) for word in lines.readline().split())
                for hook in list(self._hooks):
                    try:
                        hook(incarnation, slept_ns)
                    except Exception as error:  # noqa: BLE001 one hook that fails keeps no other from running
                        sys.excepthook(type(error), error, error.__traceback__)
                os.write(done, f"{number}\n".encode())


_restores = _Hooks("after-restore.d")
_checkpoints = _Hooks("before-checkpoint.d")
for _hooks in (_restores, _checkpoints):
    # In a forked child there is no thread, and init runs no program for it.
    os.register_at_fork(after_in_child=_hooks.forget)
