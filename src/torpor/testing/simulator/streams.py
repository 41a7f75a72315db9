"""A stream as each end sees it, and the frames between them (docs/init-protocol.md, without bytes on a wire).

Requests are counted in pieces; responses are real bytes.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from torpor.core.ids import CallId
from torpor.core.join import StreamEnd
from torpor.testing.simulator.asks import Ask

Frame: TypeAlias = tuple[int, str, int, int, Any]
"""(link nonce, type, stream, arg, payload)"""

STDOUT = 1
FIRST_STREAM = 16


class GuestStream:
    """One accepted connection in init, with the agent's end of its socket.

    Attributes:
        read, acknowledged, taken, written: R, A, V (the bytes themselves) and W of the protocol.
        fin: length of the response once the host ended it cleanly, else -1.
        end: how the agent closed its socket; `told` once CLOSED went out.
        reset: the host reset it; init has forgotten it, the agent's socket has not.
        quiet: after HELLO, until the host resumes it.
    """

    __slots__ = (
        "acknowledged",
        "ask",
        "end",
        "fin",
        "length",
        "quiet",
        "read",
        "reset",
        "sid",
        "spelling",
        "taken",
        "told",
        "written",
    )

    def __init__(self, sid: int, ask: Ask, spelling: int) -> None:
        self.sid = sid
        self.ask = ask
        self.length = ask.length
        self.spelling = spelling
        self.read = 0
        self.acknowledged = 0
        self.taken = b""
        self.written = 0
        self.fin = -1
        self.end: StreamEnd | None = None
        self.told = False
        self.reset = False
        self.quiet = False

    def copy(self) -> GuestStream:
        other = GuestStream.__new__(GuestStream)
        other.sid = self.sid
        other.ask = self.ask
        other.length = self.length
        other.spelling = self.spelling
        other.read = self.read
        other.acknowledged = self.acknowledged
        other.taken = self.taken
        other.written = self.written
        other.fin = self.fin
        other.end = self.end
        other.told = self.told
        other.reset = self.reset
        other.quiet = self.quiet
        return other


class StreamStatus:
    """One stream of a STATUS or BARRIER_ACK. `end` is set once init told, or would tell, that the client closed."""

    __slots__ = ("acknowledged", "end", "read", "sid", "taken")

    def __init__(self, stream: GuestStream) -> None:
        self.sid = stream.sid
        self.read = stream.read
        self.acknowledged = stream.acknowledged
        self.taken = len(stream.taken)
        self.end = stream.end if stream.told else None


class HostStream:
    """The node's end of a stream.

    Attributes:
        received: request pieces received in order.
        taken: response bytes that the guest had when this node came to know the stream.
        attempt: the attempt of the call that is delivered here.
        end: how it ended, as CLOSED said.
        logged: that this stream has `call_id` is in the log.
    """

    __slots__ = ("ask", "attempt", "call_id", "end", "logged", "received", "serving", "sid", "spelling", "taken")

    def __init__(self, sid: int) -> None:
        self.sid = sid
        self.ask: Ask | None = None
        self.spelling = 0
        self.received = 0
        self.taken = 0
        self.attempt = 1
        self.call_id: CallId | None = None
        self.end: StreamEnd | None = None
        self.serving = False
        self.logged = False
