"""Frames of the init protocol (docs/init-protocol.md): bytes to values and back.

Pure: no file, socket or clock. What comes from the guest is hostile: whatever does not decode is dropped and
counted, memory is bounded by one frame, and a status record that contradicts itself is "link_protocol".

    frame   = COBS(nonce u64 | type u8 | 3 zero | stream u32 | arg u64 | payload | CRC32C u32) 0x00
    status  = header (56 bytes) | stream (48 bytes) ...
"""

# Neither codec has type stubs; `encode` and `_decode` are the only places that call them.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import google_crc32c
from cobs import cobs

from torpor.core.errors import InvalidInput, SandboxFailed

PROTOCOL_VERSION = 2
WORKERS_SINCE = 2
"""The version of the protocol that brought workers; an older init is in every older image."""
NONCE_BYTES = 8
PAYLOAD_BYTES_MAX = 32_768
SPEC_BYTES_MAX = 2 * 1024 * 1024
ENTROPY_BYTES = 64
STREAMS_MAX = 256
STDOUT, STDERR = 1, 2
FIRST_CALL_STREAM = 16
FIRST_WORKER_STREAM = 1 << 31
WORKERS_MAX = 32

_HEAD = struct.Struct("<8sB3xIQ")
_CRC = struct.Struct("<I")
_BARE_BYTES = _HEAD.size + _CRC.size
_RAW_BYTES_MAX = _BARE_BYTES + PAYLOAD_BYTES_MAX
ENCODED_BYTES_MAX = _RAW_BYTES_MAX + -(-_RAW_BYTES_MAX // 254)
"""COBS adds at most one byte for each 254; the terminating zero is not counted."""

_STATUS_HEAD = struct.Struct("<IIQiIQQQII")
_STATUS_STREAM = struct.Struct("<IHBBQQQQQ")
_LIFE = struct.Struct("<QQ64s")

StreamKind = Literal["call", "output", "worker"]


class ToGuest(IntEnum):
    """Types of the frames that the host sends."""

    HELLO = 0x01
    SPEC = 0x02
    START = 0x03
    RESTORED = 0x04
    DATA = 0x05
    FIN = 0x06
    RESET = 0x07
    ACK = 0x08
    CREDIT = 0x09
    RESUME = 0x0A
    BARRIER = 0x0B
    RELEASE = 0x0C
    PING = 0x0D
    SIGNAL = 0x0E
    EXIT_ACK = 0x0F
    FORGET = 0x10
    WORK = 0x11


class FromGuest(IntEnum):
    """Types of the frames that the guest sends."""

    STATUS = 0x81
    OPEN = 0x82
    DATA = 0x83
    FIN = 0x84
    CLOSED = 0x85
    TAKEN = 0x86
    BARRIER_ACK = 0x87
    ALIVE = 0x88
    EXIT = 0x89
    PONG = 0x8A
    LOG = 0x8B
    STARTED = 0x8C


class Phase(IntEnum):
    """How far the guest is with the agent's main process."""

    WAITING = 0
    RUNNING = 1
    EXITED = 2
    COULD_NOT_START = 3


class Closed(IntEnum):
    """How a stream ended."""

    CONSUMED = 1
    """The client took everything up to the end of the response and closed in order."""
    GONE = 2
    """The client closed before the end, or broke off."""
    RESET = 3
    """The host reset it."""


_CLOSED_FLAGS = {0: None, 2: Closed.GONE, 16: Closed.CONSUMED, 32: Closed.RESET}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame; `type` stays a plain number because unknown types are legal and ignored."""

    nonce: bytes
    type: int
    stream: int = 0
    arg: int = 0
    payload: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStatus:
    """One stream as the guest reports it; all positions are bytes from the stream's beginning.

    Attributes:
        half_closed: the client ended its request.
        closed: how it ended; None while it has not.
        fin_received: the guest has the end of the response.
        resumable: false when the guest had to drop request bytes that it would need for sending them again.
        read, acknowledged, sent: R, A and what was handed to the link, of the request (or output).
        taken, written: V and W, of the response.
    """

    stream: int
    port: int
    kind: StreamKind
    half_closed: bool
    closed: Closed | None
    fin_received: bool
    resumable: bool
    read: int
    acknowledged: int
    taken: int
    written: int
    sent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestStatus:
    """What the guest says of itself, in STATUS and BARRIER_ACK; consistent, but its word alone."""

    version: int
    phase: Phase
    incarnation: int
    wait_status: int
    agent_pid: int
    next_stream: int
    last_signal_id: int
    dropped_frames: int
    start_errno: int
    streams: tuple[StreamStatus, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSpec:
    """The agent's main process: its arguments (the first is the command), directory and whole environment."""

    arguments: tuple[str, ...]
    cwd: str
    environment: Mapping[str, str]


def violation(reason: str) -> SandboxFailed:
    """The guest broke the protocol: nothing more that it says can be believed."""
    return SandboxFailed(
        "link_protocol",
        f"cannot trust the sandbox's init: {reason}",
        hint="The session is recovered from its newest checkpoint.",
    )


def encode(frame: Frame) -> bytes:
    """The frame as it goes into the FIFO, its ending zero byte included."""
    raw = _HEAD.pack(frame.nonce, frame.type, frame.stream, frame.arg) + frame.payload
    return cobs.encode(raw + _CRC.pack(google_crc32c.value(raw))) + b"\0"


class FrameReader:
    """Cuts a byte stream into the frames of one link; holds at most one frame's bytes between feeds.

    Attributes:
        dropped: frames that did not decode, or were of another link.
    """

    def __init__(self, nonce: bytes | None) -> None:
        """None takes the frames of every link, as the guest end must for HELLO."""
        self.dropped = 0
        self._nonce = nonce
        self._run = bytearray()
        self._overlong = False

    def feed(self, data: bytes) -> list[Frame]:
        *ended, rest = data.split(b"\0")
        frames: list[Frame] = []
        for piece in ended:
            self._extend(piece)
            frame = self._end_run()
            if frame is not None:
                frames.append(frame)
        self._extend(rest)
        return frames

    def _extend(self, piece: bytes) -> None:
        if self._overlong:
            return
        if len(self._run) + len(piece) > ENCODED_BYTES_MAX:
            self._overlong = True
            self._run.clear()
            return
        self._run += piece

    def _end_run(self) -> Frame | None:
        if not self._run and not self._overlong:
            return None  # A lone zero: each end writes one before its first frame.
        frame = None if self._overlong else _decode(bytes(self._run))
        self._overlong = False
        self._run.clear()
        if frame is None or (self._nonce is not None and frame.nonce != self._nonce):
            self.dropped += 1
            return None
        return frame


def _decode(encoded: bytes) -> Frame | None:
    try:
        raw = cobs.decode(encoded)
    except cobs.DecodeError:
        return None
    if not _BARE_BYTES <= len(raw) <= _RAW_BYTES_MAX:
        return None
    body, crc = raw[: -_CRC.size], raw[-_CRC.size :]
    if _CRC.unpack(crc)[0] != google_crc32c.value(body):
        return None
    nonce, kind, stream, arg = _HEAD.unpack_from(body)
    return Frame(nonce=nonce, type=kind, stream=stream, arg=arg, payload=body[_HEAD.size :])


def parse_status(payload: bytes) -> GuestStatus:
    """Read a status record.

    Raises:
        SandboxFailed: ("link_protocol") it is cut short, of another version, or contradicts itself.
    """
    if len(payload) < _STATUS_HEAD.size:
        raise violation(f"its status has {len(payload)} bytes")
    version, phase, incarnation, wait_status, pid, next_stream, signal_id, dropped, errno, count = (
        _STATUS_HEAD.unpack_from(payload)
    )
    if not 1 <= version <= PROTOCOL_VERSION:
        raise violation(f"it speaks version {version} of the protocol, this node speaks 1 to {PROTOCOL_VERSION}")
    if phase not in list(Phase):
        raise violation(f"its status names phase {phase}")
    if len(payload) != _STATUS_HEAD.size + count * _STATUS_STREAM.size:
        raise violation(f"its status has {len(payload)} bytes for {count} streams")
    if next_stream < FIRST_CALL_STREAM:
        raise violation(f"its next stream would be {next_stream}")
    records = payload[_STATUS_HEAD.size :]
    return GuestStatus(
        version=version,
        phase=Phase(phase),
        incarnation=incarnation,
        wait_status=wait_status,
        agent_pid=pid,
        next_stream=next_stream,
        last_signal_id=signal_id,
        dropped_frames=dropped,
        start_errno=errno,
        streams=_parse_streams(records, next_stream),
    )


def _parse_streams(records: bytes, next_stream: int) -> tuple[StreamStatus, ...]:
    streams = tuple(_parse_stream(fields, next_stream) for fields in _STATUS_STREAM.iter_unpack(records))
    if len({stream.stream for stream in streams}) != len(streams):
        raise violation("its status lists a stream twice")
    if sum(stream.kind == "call" for stream in streams) > STREAMS_MAX:
        raise violation(f"its status lists {len(streams)} streams")
    return streams


def _parse_stream(fields: tuple[int, ...], next_stream: int) -> StreamStatus:
    number, port, kind, flags, read, acknowledged, taken, written, sent = fields
    is_call = kind == 0 and FIRST_CALL_STREAM <= number < next_stream
    legal_number = is_call or (kind == 1 and number in (STDOUT, STDERR))
    if not legal_number:
        raise violation(f"its status lists stream {number} as class {kind}")
    if acknowledged > read or sent > read or written > taken:
        raise violation(f"the positions of stream {number} contradict each other")
    ended = flags & sum(_CLOSED_FLAGS)
    whole = flags & 4 and taken == written
    if ended not in _CLOSED_FLAGS or (ended and not is_call) or (_CLOSED_FLAGS[ended] is Closed.CONSUMED and not whole):
        raise violation(f"stream {number} can't have ended with flags {flags:#x}")
    return StreamStatus(
        stream=number,
        port=port,
        kind="output" if kind else "call",
        half_closed=bool(flags & 1),
        closed=_CLOSED_FLAGS[ended],
        fin_received=bool(flags & 4),
        resumable=not flags & 8,
        read=read,
        acknowledged=acknowledged,
        taken=taken,
        written=written,
        sent=sent,
    )


def pack_spec(spec: AgentSpec) -> bytes:
    """The agent's spec as NUL-terminated strings: cwd, argc, the arguments, envc, the environment.

    Raises:
        InvalidInput: a string holds a NUL, there is no command, or the spec is longer than 2 MiB.
    """
    environment = _pairs(spec.environment)
    strings = [spec.cwd, str(len(spec.arguments)), *spec.arguments, str(len(environment)), *environment]
    packed = _terminated(strings)
    if not spec.arguments or not spec.arguments[0]:
        raise InvalidInput("agent_spec_unusable", "cannot start the agent: it has no command")
    if len(packed) > SPEC_BYTES_MAX:
        raise InvalidInput(
            "agent_spec_unusable",
            f"cannot start the agent: its arguments and environment have {len(packed)} bytes",
            hint=f"At most {SPEC_BYTES_MAX} bytes fit: put large values in a file of the workspace.",
        )
    return packed


def pack_life(first_ns: int, second_ns: int, entropy: bytes, environment: Mapping[str, str] | None = None) -> bytes:
    """The payload of START (incarnation, wall time) and of RESTORED (wall time, time slept)."""
    if len(entropy) != ENTROPY_BYTES:
        raise ValueError(f"entropy has {len(entropy)} bytes, not {ENTROPY_BYTES}")
    packed = _LIFE.pack(first_ns, second_ns, entropy) + _terminated(_pairs(environment or {}))
    if len(packed) > PAYLOAD_BYTES_MAX:
        raise InvalidInput(
            "environment_too_large",
            f"cannot change the agent's environment: the changes have {len(packed)} bytes",
        )
    return packed


def _pairs(environment: Mapping[str, str]) -> list[str]:
    for name in environment:
        if not name or "=" in name:
            raise InvalidInput("agent_spec_unusable", f"cannot set variable {name!r}: that is no name of a variable")
    return [f"{name}={value}" for name, value in environment.items()]


def _terminated(strings: list[str]) -> bytes:
    if any("\0" in string for string in strings):
        raise InvalidInput("agent_spec_unusable", "cannot pass a string to the agent: it holds a NUL character")
    return b"".join(string.encode("utf-8", "surrogateescape") + b"\0" for string in strings)
