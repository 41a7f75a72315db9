"""The sandbox: init's buffers, the FIFO pair, and the workspace that it mounts.

Init is as the protocol says: it keeps request bytes until they are acknowledged, takes response bytes in, hands them to
the agent's sockets, and tells closes before anything that came after them.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from torpor.core.join import StreamEnd
from torpor.testing.simulator.agent import Agent
from torpor.testing.simulator.asks import Ask
from torpor.testing.simulator.streams import FIRST_STREAM, STDOUT, Frame, GuestStream, StreamStatus

if TYPE_CHECKING:
    from torpor.testing.simulator.world import World


class Guest:
    """Everything that an image holds."""

    __slots__ = (
        "agent",
        "barrier",
        "closing",
        "incarnation",
        "next_stream",
        "nonce",
        "out_acknowledged",
        "out_quiet",
        "out_read",
        "streams",
        "told_exit",
    )

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.incarnation = 0
        self.nonce = 0
        self.barrier = 0
        self.next_stream = FIRST_STREAM
        self.streams: dict[int, GuestStream] = {}
        self.closing: list[int] = []
        self.out_read = 0
        self.out_acknowledged = 0
        self.out_quiet = False
        self.told_exit = False

    def copy(self) -> Guest:
        other = Guest.__new__(Guest)
        other.agent = self.agent.copy()
        other.incarnation = self.incarnation
        other.nonce = self.nonce
        other.barrier = self.barrier
        other.next_stream = self.next_stream
        other.streams = {sid: stream.copy() for sid, stream in self.streams.items()}
        other.closing = self.closing.copy()
        other.out_read = self.out_read
        other.out_acknowledged = self.out_acknowledged
        other.out_quiet = self.out_quiet
        other.told_exit = self.told_exit
        return other

    def connect(self, ask: Ask, spelling: int) -> GuestStream:
        """The agent connects and writes its request."""
        stream = GuestStream(self.next_stream, ask, spelling)
        self.next_stream += 1
        self.streams[stream.sid] = stream
        return stream

    def close(self, stream: GuestStream, end: StreamEnd) -> None:
        """The agent closes its socket; init will notice."""
        stream.end = end
        self.closing.append(stream.sid)

    def statuses(self) -> list[StreamStatus]:
        """The streams of a status record: those that init has accepted and not forgotten."""
        return [StreamStatus(stream) for stream in self.streams.values() if stream.read and not stream.reset]


class Sandbox:
    """A running sandbox: a guest, its FIFO pair and its workspace."""

    __slots__ = (
        "agent_waits",
        "alive",
        "guest",
        "holders",
        "incarnation",
        "init_waits",
        "paused",
        "stopped",
        "to_guest",
        "to_host",
        "workspace",
        "world",
    )

    def __init__(self, world: World, guest: Guest, workspace: int, incarnation: int) -> None:
        self.world = world
        self.guest = guest
        self.workspace = workspace
        self.incarnation = incarnation
        self.alive = True
        self.paused = False
        self.stopped = False
        """By the watchdog, for good: its node's own resume does not undo it."""
        self.to_guest: deque[Frame] = deque()
        self.to_host: deque[Frame] = deque()
        self.holders: set[int] = set()
        self.agent_waits = False
        self.init_waits = False
        """Neither the agent nor init has anything to do before the other moves, or a frame comes."""

    @property
    def runs(self) -> bool:
        return self.alive and not self.paused and not self.stopped

    def send(self, kind: str, sid: int = 0, arg: int = 0, payload: object = None) -> None:
        self.to_host.append((self.guest.nonce, kind, sid, arg, payload))

    def step(self) -> bool:
        """One step of the agent or of init."""
        if not self.alive or self.paused or self.stopped:
            return False
        to_guest, chance = self.to_guest, self.world.random()
        if to_guest and chance < 0.5:
            self._receive(to_guest.popleft())
            while to_guest and chance < 0.3 and self.world.goes_on():
                chance *= 1.6
                self._receive(to_guest.popleft())
            return True
        if chance > 0.7 and self._step_agent():
            return True
        if not self.init_waits:
            if self._serve_sockets():
                self.agent_waits = False
                return True
            # A close that goes out only by chance is not waited for.
            self.init_waits = not self.guest.closing
        if to_guest:
            self._receive(to_guest.popleft())
            return True
        return chance <= 0.7 and self._step_agent()

    def _step_agent(self) -> bool:
        """The agent runs from its START on; a restored one runs on at once, before anybody spoke to it."""
        guest = self.guest
        agent = guest.agent
        impatient = agent.patience > 0 and self.world.random() < agent.patience * agent.unfinished
        if self.agent_waits and not impatient:
            return False
        if guest.incarnation and agent.unfinished and agent.step(self, impatient=impatient):
            self.init_waits = self.agent_waits = False
            return True
        self.agent_waits = True
        return False

    def _serve_sockets(self) -> bool:
        """Hand response bytes to sockets; outside of a barrier also notice closes and read requests and output."""
        guest = self.guest
        readable = None
        for stream in guest.streams.values():
            if stream.end is None and not stream.reset:
                if stream.written < len(stream.taken):
                    stream.written = len(stream.taken)
                    return True
                if stream.read < stream.length and not stream.quiet:
                    readable = stream
        if guest.barrier or not guest.nonce:
            return False
        if guest.closing and (self.world.rules.close_goes_first or self.world.random() < 0.2):
            # A retry must not overtake the close that caused it, or the host takes it for a second call on purpose.
            return self._tell_close(guest.closing[0])
        if readable is not None:
            readable.read += 1
            self.send("DATA", readable.sid, readable.read - 1, (readable.ask, readable.spelling, 1))
            return True
        return self._read_output()

    def _tell_close(self, sid: int) -> bool:
        guest = self.guest
        stream = guest.streams.get(sid)
        if stream is None:
            guest.closing.pop(0)
            return True
        if stream.quiet:
            return False
        guest.closing.pop(0)
        if stream.read == 0:
            del guest.streams[sid]
        else:
            stream.told = True
            self.send("CLOSED", sid, stream.written, stream.end)
        return True

    def _read_output(self) -> bool:
        guest = self.guest
        printed = guest.agent.printed
        if guest.out_quiet:
            return False
        if guest.out_read < len(printed):
            self.send("DATA", STDOUT, guest.out_read, printed[guest.out_read :])
            guest.out_read = len(printed)
            return True
        if guest.agent.ended and not guest.told_exit:
            guest.told_exit = True
            self.send("EXIT", arg=guest.agent.counter)
            return True
        return False

    def _receive(self, frame: Frame) -> None:
        nonce, kind, sid, arg, payload = frame
        guest = self.guest
        self.agent_waits = self.init_waits = False
        if self.world.trace is not None:
            self.world.note(f"guest {self.incarnation} gets {kind} {sid} {arg}")
        if kind == "HELLO":
            self._begin_link(nonce)
        elif nonce != guest.nonce:
            return
        elif sid == STDOUT:
            self._receive_for_output(kind, arg)
        elif sid:
            stream = guest.streams.get(sid)
            if stream is not None:
                self._receive_for_stream(kind, stream, arg, payload)
        else:
            self._receive_for_link(kind, arg)

    def _begin_link(self, nonce: int) -> None:
        guest = self.guest
        guest.nonce = nonce
        guest.barrier = 0
        guest.out_quiet = True
        for stream in guest.streams.values():
            stream.quiet = stream.read > 0
        self.send("STATUS", arg=guest.out_acknowledged, payload=guest.statuses())

    def _receive_for_link(self, kind: str, arg: int) -> None:
        guest = self.guest
        if kind == "BARRIER":
            guest.barrier = arg
            self.send("BARRIER_ACK", arg=arg, payload=guest.statuses())
        elif kind == "RELEASE":
            if guest.barrier == arg:
                guest.barrier = 0
        elif kind == "RESTORED":
            guest.incarnation = arg
            self.send("ALIVE", arg=arg)
        elif kind == "EXIT_ACK":
            self.alive = False

    def _receive_for_stream(self, kind: str, stream: GuestStream, arg: int, piece: bytes) -> None:
        if kind == "DATA":
            have = len(stream.taken)
            if arg <= have < arg + len(piece) and not stream.reset:
                stream.taken += piece[have - arg :]
        elif kind == "FIN":
            stream.fin = arg
        elif kind == "RESET":
            stream.reset = stream.reset or stream.end is None
            stream.quiet = False  # So that a close that it crossed is told, also right after HELLO.
        elif kind == "FORGET":
            if stream.end is not None:
                del self.guest.streams[stream.sid]
        elif kind == "ACK":
            stream.acknowledged = max(stream.acknowledged, arg)
            if stream.told and not self.world.rules.close_outlives_acknowledgement:
                del self.guest.streams[stream.sid]
        else:
            stream.quiet = False
            if arg < stream.read:
                self.send("DATA", stream.sid, arg, (stream.ask, stream.spelling, stream.read - arg))

    def _receive_for_output(self, kind: str, arg: int) -> None:
        guest = self.guest
        if kind == "ACK":
            guest.out_acknowledged = max(guest.out_acknowledged, arg)
        elif kind == "RESUME":
            guest.out_quiet = False
            guest.out_read = arg
            guest.told_exit = False
