"""A node: the process that owns sessions. Clock, runtime, signals and the socket meet here.

`torpor run` and `torpor resume` in the foreground are a node of one session; detached, the same code runs in a process
of its own. The socket answers the runtime's verbs to the same user's other commands.
"""

import asyncio
import contextlib
import gc
import hashlib
import importlib
import os
import resource
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from torpor import wire
from torpor.core.clock import Clock, SystemClock
from torpor.core.errors import Conflict, SandboxFailed
from torpor.core.ids import SessionId, WaitpointId, new_node_id
from torpor.core.waitpoint import ToldFile
from torpor.db.roots import Move
from torpor.runtime.joining import Aside
from torpor.runtime.records import Records
from torpor.runtime.request import Request
from torpor.runtime.runtime import Runtime, node_holder, open_runtime

if TYPE_CHECKING:
    from torpor.runtime.owner import Owner
    from torpor.runtime.watcher import Outcome, Watcher


SWITCH_SECONDS = 0.0005
LARGE_BLOCK_BYTES = 512 << 10
ANSWER_SECONDS = 180
"""For what a node is asked by another process: to stop is to wait for an answer and to make a checkpoint."""


class Node:
    """One process's runtime, with its identity and the sessions that it owns now."""

    def __init__(self, runtime: Runtime, clock: Clock) -> None:
        self.runtime = runtime
        # What other commands do to a session is brief.
        self.holder = replace(node_holder(runtime.home, new_node_id(clock.wall_ns())), is_brief=True)
        self._owners: dict[SessionId, Owner] = {}

    async def run(
        self, session_id: SessionId, watcher: "Watcher", *, let_go: bool = False, boot: bool = False
    ) -> "Outcome":
        """Be the node of one session: drive it to its end, or until a signal or another command asks to stop.

        Args:
            let_go: a person lets the agent take another path than the log's.
            boot: a person gives up the agent's memory, if its sandbox does not live.
        """
        async with contextlib.AsyncExitStack() as owned:
            await owned.enter_async_context(self.serving())
            owner = await owned.enter_async_context(self.owning(session_id, watcher, let_go=let_go, boot=boot))
            await owned.enter_async_context(_signals(owner, watcher))
            return await owner.run()

    @contextlib.asynccontextmanager
    async def serving(self, more: Mapping[str, wire.Verb] | None = None) -> AsyncGenerator[None]:
        """Answer other commands about the sessions that this node owns, and `more`, while the context lasts."""
        put_the_loop_first()
        verbs: dict[str, wire.Verb] = {
            "ping": _ping,
            "checkpoint": self._of_session(_checkpoint),
            "pin": self._of_session(_pin),
            "in_use": self._of_session(_in_use),
            "move": self._of_session(_move),
            "budget": self._of_session(_budget),
            "resolve": self._of_session(_resolve),
            "send": self._of_session(_send),
            "continue": self._of_session(_let_go),
            "kill": self._of_session(_kill),
            "stop": self._of_session(_stop),
            "hibernate": self._of_session(_hibernate),
            "wake": self._of_session(_wake),
            "tiers": self._tiers,
            **(more or {}),
        }
        async with wire.serve(self.holder.socket, verbs, {"work": self._work}):
            yield

    @contextlib.asynccontextmanager
    async def owning(
        self,
        session_id: SessionId,
        watcher: "Watcher",
        *,
        attended: bool = True,
        let_go: bool = False,
        boot: bool = False,
        aside: Aside = contextlib.nullcontext,
    ) -> "AsyncGenerator[Owner]":
        """Acquire a session; other commands reach it through this node as long as the context lasts.

        Args: as `run`, and
            attended, aside: as `Runtime.own`.
        """
        me = replace(self.holder, is_brief=False)
        how: dict[str, Any] = {"attended": attended, "let_go": let_go, "boot": boot, "aside": aside}
        async with self.runtime.own(session_id, me, wire.answers, watcher, **how) as owner:
            self._owners[session_id] = owner
            try:
                yield owner
            finally:
                del self._owners[session_id]

    async def ask(self, session_id: SessionId, verb: str, **arguments: object) -> dict[str, Any] | None:
        """What the node that runs the session answers to a verb; None: none runs it.

        Raises:
            As `wire.ask`.
        """
        return await _ask(self.runtime.home.lock(session_id), verb, session=session_id, **arguments)

    async def ask_or_own(
        self,
        session_id: SessionId,
        verb: str,
        act: Callable[[Records], Awaitable[dict[str, Any]]],
        **arguments: object,
    ) -> dict[str, Any]:
        """What the node that runs the session answers to a verb; if none runs it, what `act` does to its rows."""
        answer = await self.ask(session_id, verb, **arguments)
        if answer is not None:
            return answer
        async with self.runtime.borrow(session_id, self.holder, wire.answers) as records:
            done = await act(records)
        await self.ask_daemon("look")
        return done

    async def ask_daemon(self, verb: str, **arguments: object) -> dict[str, Any] | None:
        """What the node daemon answers to a verb; None: none runs.

        Raises:
            As `wire.ask`.
        """
        return await _ask(self.runtime.home.daemon_lock, verb, **arguments)

    async def create(self, request: Request) -> SessionId:
        session = await self.runtime.create(request, os.environ)
        return session.session_id

    def _of_session(self, act: "Callable[..., Awaitable[dict[str, Any]]]") -> wire.Verb:
        async def verb(session: str, **arguments: Any) -> dict[str, Any]:
            return await act(self._owner(session), **arguments)

        return verb

    def _owner(self, session: str) -> "Owner":
        owner = self._owners.get(SessionId(session))
        if owner is None:
            raise Conflict(
                "session_not_running",
                f"cannot reach session {session}: this node has just let it go, or is taking it",
                hint="Try again in a moment.",
            )
        return owner

    async def _tiers(self) -> dict[str, Any]:
        """What this node keeps in memory of the sleeping sessions that it owns; of others there may be an image."""
        tiers = {session_id: owner.tier for session_id, owner in self._owners.items()}
        return {session_id: tier.value for session_id, tier in tiers.items() if tier and tier.keeps_something}

    async def _work(self, session: str, worker: str) -> wire.Carry:
        """Start a worker in the sandbox, and carry its bytes; this node reads none of them."""
        from torpor.runtime.carrying import carry

        return partial(carry, await self._owner(session).work(worker))


def put_the_loop_first() -> None:
    """The event loop carries the agents' bytes; the threads beside it hash and pack for seconds.

    One that wants the interpreter gets it after half a millisecond, not after five. And what the imports left behind is
    not looked through again at each collection, which takes 30 ms. That is done once, before any session is here: what
    is dead by then, and what of a session were alive, would never be freed.
    """
    importlib.import_module("torpor.runtime.owning")  # All that drives sessions.

    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()


@contextlib.asynccontextmanager
async def open_node(clock: Clock | None = None) -> AsyncGenerator[Node]:
    """A node on the configured TORPOR_HOME."""
    _harden()
    _allocate_from_one_arena()
    clock = clock or SystemClock()
    async with open_runtime(os.environ, clock) as runtime:
        yield Node(runtime, clock)


def _harden() -> None:
    """This process holds keys: no core dumps, and no attaching by other processes of the same user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        import ctypes

        pr_set_dumpable = 4
        ctypes.CDLL(None).prctl(pr_set_dumpable, 0, 0, 0, 0)


def _allocate_from_one_arena() -> None:
    """A node lives for months, and glibc gives each of its threads an arena of its own, which it hardly ever shrinks:
    what saves and restores allocate and free fragments all of them, by 0.2 MB with each sleep. Large blocks, as the
    state of a kernel of 5 MB, stay out of the arena: it would keep the holes that they leave. Before any thread is.
    """
    import ctypes

    m_arena_max, m_mmap_threshold = -8, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(m_arena_max, 1)
        mallopt(m_mmap_threshold, LARGE_BLOCK_BYTES)


@contextlib.asynccontextmanager
async def _signals(owner: "Owner", watcher: "Watcher") -> AsyncGenerator[None]:
    """Ctrl-C goes to the agent first; the second one, and SIGTERM, checkpoint the session and leave it to `resume`."""
    loop = asyncio.get_running_loop()
    interrupts = 0
    tasks: set[asyncio.Task[None]] = set()

    def interrupted() -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts == 1:
            watcher.notice("interrupting the agent; Ctrl-C again checkpoints the session and stops")
            tasks.add(loop.create_task(owner.forward_signal(signal.SIGINT)))
        else:
            stop()

    def stop() -> None:
        watcher.notice("stopping; `torpor resume` goes on from here")
        owner.ask_to_stop()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    loop.add_signal_handler(signal.SIGTERM, stop)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        loop.remove_signal_handler(signal.SIGTERM)


async def _ping() -> dict[str, Any]:
    return {"pid": os.getpid()}


async def _let_go(owner: "Owner") -> dict[str, Any]:
    owner.let_go()
    return {}


async def _checkpoint(owner: "Owner", pin: bool = False) -> dict[str, Any]:
    made = await owner.checkpoint(is_pinned=pin)
    if made is None:
        raise SandboxFailed(
            "checkpoint_failed", "cannot make a checkpoint now", hint="`torpor log SESSION` has the reason."
        )
    return {"number": made.number, "freeze_ns": made.freeze_ns, "stored_bytes": made.stored_bytes}


async def _pin(owner: "Owner", number: int, pinned: bool) -> dict[str, Any]:
    await owner.records.pin(number, is_pinned=pinned)
    return {}


async def _in_use(owner: "Owner") -> dict[str, Any]:
    return {"snapshots": sorted(owner.snapshots_in_use())}


async def _move(owner: "Owner", moves: list[dict[str, str]]) -> dict[str, Any]:
    return {"moved": await owner.move([msgspec.convert(move, Move) for move in moves])}


async def _budget(owner: "Owner", add: int) -> dict[str, Any]:
    return asdict(await owner.add_to_budget(add))


async def _resolve(
    owner: "Owner", waitpoint: str, answer: str | None, files: Sequence[ToldFile] = ()
) -> dict[str, Any]:
    point = await owner.resolve(WaitpointId(waitpoint), answer, files)
    return {"waitpoint": point.waitpoint_id, "kind": point.kind.value}


async def _send(owner: "Owner", text: str) -> dict[str, Any]:
    return {"number": await owner.deliver(text)}


async def _kill(owner: "Owner") -> dict[str, Any]:
    """End the session, and answer when it has ended."""
    owner.ask_to_kill()
    await owner.ended.wait()
    return {}


async def _stop(owner: "Owner", now: bool = False) -> dict[str, Any]:
    """Put the session to sleep, unless `now` when no answer is arriving; answer when it sleeps or can't."""
    from torpor.runtime.owner import LEAVE_SECONDS

    if not now:
        await owner.leave(LEAVE_SECONDS)
    if not await owner.stop():
        raise SandboxFailed(
            "checkpoint_failed",
            "cannot stop the session: no checkpoint could be made, it runs on",
            hint="`torpor log SESSION` has the reason.",
        )
    return {}


async def _hibernate(owner: "Owner") -> dict[str, Any]:
    """Put the session to sleep if its agent only waits, however short; answer when it sleeps."""
    await owner.hibernate()
    return {}


async def _wake(owner: "Owner") -> dict[str, Any]:
    owner.wake()
    return {}


async def _ask(lock: Path, verb: str, **arguments: object) -> dict[str, Any] | None:
    """What the holder of a lock answers; None: nobody holds it who could."""
    socket = socket_of(lock)
    return None if socket is None else await wire.ask(socket, verb, deadline_seconds=ANSWER_SECONDS, **arguments)


def socket_of(lock: Path) -> Path | None:
    """The socket of the node that holds a session's lock, or that holds the daemon's."""
    from torpor.runtime.leasing import is_held, read_holder

    holder = read_holder(lock) if is_held(lock) else None
    return holder.socket if holder and not holder.is_brief else None


def upstreams_digest(runtime: Runtime) -> str:
    """Says whether two processes would call the same providers with the same keys; tells neither."""
    said = [(repr(upstream), upstream.key.value and upstream.key.value.reveal()) for upstream in runtime.upstreams]
    return hashlib.sha256(repr(said).encode()).hexdigest()
