"""What a worker of init and the host say to each other on the worker's stream (docs/init-protocol.md, "Workers").

    record = type u8 | length u32 (little-endian) | payload, at most PAYLOAD_BYTES_MAX bytes

Pure. What comes from the guest is hostile: memory is bounded by one record, and what is no record is "link_protocol".
"""

import struct
from dataclasses import dataclass

from torpor.core.errors import Conflict
from torpor.sandbox.frames import PAYLOAD_BYTES_MAX, WORKERS_MAX, WORKERS_SINCE, AgentSpec, pack_spec, violation

EXEC, COPY_OUT, COPY_IN, PREPARE = "torpor-exec", "torpor-copy-out", "torpor-copy-in", "torpor-prepare"
STDIN_WINDOW_BYTES = 65_536
"""Bytes of stdin that may be on their way: what the program takes is granted anew."""

_HEAD = struct.Struct("<BI")
NUMBER = struct.Struct("<i")
_TEXT_CHARACTERS_MAX = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record; `kind` is a single byte, and unknown ones are legal and ignored."""

    kind: bytes
    payload: bytes = b""

    @property
    def number(self) -> int:
        """The payload as the number that it is for kinds X and W.

        Raises:
            SandboxFailed: ("link_protocol") it is none.
        """
        if len(self.payload) != NUMBER.size:
            raise violation(f"its record {self.kind!r} has {len(self.payload)} bytes")
        return NUMBER.unpack(self.payload)[0]

    @property
    def failure(self) -> tuple[int, str]:
        """Of kind F: the errno, and what could not be done, printable."""
        text = self.payload[NUMBER.size :].decode("utf-8", "replace")[:_TEXT_CHARACTERS_MAX]
        number = NUMBER.unpack_from(self.payload)[0] if len(self.payload) >= NUMBER.size else 0
        return number, "".join(character if character.isprintable() else "?" for character in text)


def encode(kind: bytes, payload: bytes = b"") -> bytes:
    """A record as it goes to the worker; the payload has at most PAYLOAD_BYTES_MAX bytes."""
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise ValueError(f"record {kind!r} has {len(payload)} bytes")
    return _HEAD.pack(kind[0], len(payload)) + payload


class RecordReader:
    """Cuts what a worker says into records; holds at most one of them between feeds."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> list[Record]:
        """The records that are whole now.

        Raises:
            SandboxFailed: ("link_protocol") one is too long.
        """
        self._held += data
        records: list[Record] = []
        at = 0
        while len(self._held) - at >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._held, at)
            if length > PAYLOAD_BYTES_MAX:
                raise violation(f"its record has {length} bytes")
            end = at + _HEAD.size + length
            if end > len(self._held):
                break
            records.append(Record(kind=bytes([kind]), payload=bytes(self._held[at + _HEAD.size : end])))
            at = end
        del self._held[:at]
        return records


def exec_request(spec: AgentSpec) -> bytes:
    """What tells an exec worker what to run.

    Raises:
        InvalidInput: as `pack_spec`.
    """
    packed = pack_spec(spec)
    pieces = [packed[at : at + PAYLOAD_BYTES_MAX] for at in range(0, len(packed), PAYLOAD_BYTES_MAX)]
    return b"".join(encode(b"P", piece) for piece in pieces) + encode(b"G")


def check_can_work(version: int, busy: int) -> None:
    """Whether an init of this version of the protocol can start one more worker.

    Raises:
        Conflict: `init_too_old`, `workers_busy`.
    """
    if version < WORKERS_SINCE:
        raise Conflict(
            "init_too_old",
            "cannot do this in the session: its init is too old for exec and cp",
            hint="A session keeps the init that it was made with; new sessions have the present one.",
        )
    if busy >= WORKERS_MAX:
        raise Conflict("workers_busy", f"cannot do this in the session: {WORKERS_MAX} others are at it already")
