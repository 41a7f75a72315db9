"""A simulated agent: some threads that make calls, and remember in memory and workspace what came of it.

What a thread asks next depends on the answers that it received, so two different answers lead to two different agents.
A client times out and tries again, now and then in another spelling. Its memory is what an image holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torpor.core.join import StreamEnd
from torpor.testing.simulator.asks import POOL, Ask
from torpor.testing.simulator.streams import GuestStream

if TYPE_CHECKING:
    from torpor.testing.simulator.guest import Sandbox

TRIES_MAX = 3


class Op:
    """One thing a thread does. A `fixed` one asks the same whatever the thread has learned."""

    __slots__ = ("base", "fixed", "kind")

    def __init__(self, kind: str, base: int, fixed: bool) -> None:
        self.kind = kind
        self.base = base
        self.fixed = fixed


class Thread:
    """One thread; `sid` is the stream it waits on, 0 when it waits on none."""

    __slots__ = ("digest", "ops", "pc", "sid", "tries")

    def __init__(self, ops: tuple[Op, ...]) -> None:
        self.ops = ops
        self.pc = 0
        self.sid = 0
        self.tries = 0
        self.digest = 0

    def copy(self) -> Thread:
        other = Thread.__new__(Thread)
        other.ops = self.ops
        other.pc = self.pc
        other.sid = self.sid
        other.tries = self.tries
        other.digest = self.digest
        return other


class Agent:
    """All threads, and the memory they share.

    Attributes:
        fickle: it also goes by something that a restore changes, so it diverges.
        answers: serials of the answers it consumed, with what it had asked, in order.
        asked: how often it began to ask each logical request; retries do not count.
        counter: kept in memory here, and in a file of the workspace, in one breath.
        printed: everything it wrote to stdout.
    """

    __slots__ = ("answers", "asked", "counter", "fickle", "patience", "printed", "threads", "unfinished")

    def __init__(self, threads: list[Thread], *, fickle: bool, patience: float) -> None:
        self.threads = threads
        self.fickle = fickle
        self.patience = patience
        self.answers: list[tuple[int, int]] = []
        self.asked: dict[int, int] = {}
        self.counter = 0
        self.printed = b""
        self.unfinished = len(threads)

    def copy(self) -> Agent:
        other = Agent.__new__(Agent)
        other.threads = [thread.copy() for thread in self.threads]
        other.fickle = self.fickle
        other.patience = self.patience
        other.answers = self.answers.copy()
        other.asked = self.asked.copy()
        other.counter = self.counter
        other.printed = self.printed
        other.unfinished = self.unfinished
        return other

    @property
    def ended(self) -> bool:
        return self.unfinished == 0

    def blocked(self, streams: dict[int, GuestStream]) -> bool:
        """Every thread that has not ended waits for an answer of which nothing came."""
        waiting = [thread for thread in self.threads if thread.pc < len(thread.ops)]
        return all(
            thread.sid != 0
            and streams[thread.sid].read == streams[thread.sid].ask.length
            and not streams[thread.sid].taken
            and not streams[thread.sid].reset
            for thread in waiting
        )

    def step(self, sandbox: Sandbox, *, impatient: bool) -> bool:
        """Let one thread act, if any can; an `impatient` one gives up what it waits for."""
        threads = self.threads
        if len(threads) == 1:
            return self._thread_step(threads[0], sandbox, impatient)
        first = int(sandbox.world.random() * len(threads))
        for number in range(len(threads)):  # noqa: SIM110 - a generator here costs a tenth of the whole run
            if self._thread_step(threads[first - number], sandbox, impatient):
                return True
        return False

    def _thread_step(self, thread: Thread, sandbox: Sandbox, impatient: bool) -> bool:
        if thread.sid == 0:
            if thread.pc == len(thread.ops):
                return False
            self._ask(thread, sandbox)
            return True
        stream = sandbox.guest.streams[thread.sid]
        if stream.reset:
            sandbox.world.witness.saw_reset(sandbox, stream)
            del sandbox.guest.streams[thread.sid]
            self._try_again(thread, sandbox, stream.ask)
            return True
        if stream.fin >= 0 and stream.written == stream.fin:
            self._consume(thread, sandbox, stream)
            return True
        if impatient and thread.tries < TRIES_MAX:
            sandbox.world.witness.gives_up(stream)
            sandbox.guest.close(stream, StreamEnd.GONE)
            self._try_again(thread, sandbox, stream.ask)
            return True
        return False

    def _ask(self, thread: Thread, sandbox: Sandbox) -> None:
        op = thread.ops[thread.pc]
        pool = POOL[op.kind]
        number = op.base
        if not op.fixed:
            number += thread.digest + (sandbox.guest.incarnation if self.fickle else 0)
        ask = pool[number % len(pool)]
        self.asked[ask.index] = self.asked.get(ask.index, 0) + 1
        sandbox.world.witness.asks(sandbox, ask, self.asked[ask.index])
        thread.tries = 1
        thread.sid = sandbox.guest.connect(ask, 0).sid
        if sandbox.world.trace is not None:
            sandbox.world.note(f"agent {sandbox.incarnation} asks {ask.kind}#{ask.index} on {thread.sid}")

    def _try_again(self, thread: Thread, sandbox: Sandbox, ask: Ask) -> None:
        """The client's own retry, in some spelling; after `TRIES_MAX` the thread goes on without an answer."""
        if thread.tries == TRIES_MAX:
            thread.sid = 0
            self._go_on(thread, sandbox, learned=0)
            return
        thread.tries += 1
        spelling = int(sandbox.world.random() * len(ask.keys))
        thread.sid = sandbox.guest.connect(ask, spelling).sid
        if sandbox.world.trace is not None:
            sandbox.world.note(f"agent {sandbox.incarnation} asks {ask.kind}#{ask.index} again on {thread.sid}")

    def _consume(self, thread: Thread, sandbox: Sandbox, stream: GuestStream) -> None:
        serial = sandbox.world.witness.consumes(sandbox, stream)
        if sandbox.world.trace is not None:
            sandbox.world.note(f"agent {sandbox.incarnation} consumes {serial} on {stream.sid}")
        self.answers.append((serial, stream.ask.index))
        sandbox.guest.close(stream, StreamEnd.CONSUMED)
        thread.sid = 0
        self._go_on(thread, sandbox, learned=serial)

    def _go_on(self, thread: Thread, sandbox: Sandbox, *, learned: int) -> None:
        thread.digest = (thread.digest * 31 + learned) & 0xFFFF
        thread.pc += 1
        if thread.pc == len(thread.ops):
            self.unfinished -= 1
        self.counter += 1
        sandbox.workspace += 1
        silent = self.fickle and (thread.digest + sandbox.guest.incarnation) % 3 == 0
        if learned and not silent:
            self.printed += b"x" * (learned % 4) + b"%d." % learned
