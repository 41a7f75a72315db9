"""Names of things: every id is a string with a prefix, so that one kind can't pass for another.

New ids are time-ordered (48 bits of milliseconds, 80 random bits, Crockford base 32), so listings sort by age.
"""

import secrets
from typing import NewType

from torpor.core.errors import InvalidInput

SessionId = NewType("SessionId", str)
CallId = NewType("CallId", str)
CheckpointId = NewType("CheckpointId", str)
SnapshotId = NewType("SnapshotId", str)
KeyId = NewType("KeyId", str)
"""Names an encryption key without telling it; derived from the key, see snapshots/cipher.py."""
WaitpointId = NewType("WaitpointId", str)
NodeId = NewType("NodeId", str)
StreamId = NewType("StreamId", int)

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def _new(prefix: str, wall_ns: int) -> str:
    number = ((wall_ns // 1_000_000) & ((1 << 48) - 1)) << 80 | secrets.randbits(80)
    digits = [_ALPHABET[(number >> shift) & 31] for shift in range(125, -1, -5)]
    return f"{prefix}_{''.join(digits)}"


def new_session_id(wall_ns: int) -> SessionId:
    return SessionId(_new("ses", wall_ns))


def new_call_id(wall_ns: int) -> CallId:
    return CallId(_new("call", wall_ns))


def new_checkpoint_id(wall_ns: int) -> CheckpointId:
    return CheckpointId(_new("chk", wall_ns))


def new_snapshot_id(wall_ns: int) -> SnapshotId:
    return SnapshotId(_new("snp", wall_ns))


def new_waitpoint_id(wall_ns: int) -> WaitpointId:
    return WaitpointId(_new("wp", wall_ns))


def new_node_id(wall_ns: int) -> NodeId:
    return NodeId(_new("node", wall_ns))


def parse_session_id(text: str) -> SessionId:
    """Check the shape of a session id that a person typed.

    Raises:
        InvalidInput: it is not `ses_` and 26 base-32 digits.
    """
    prefix, _, digits = text.partition("_")
    if prefix != "ses" or len(digits) != 26 or any(digit not in _ALPHABET for digit in digits):
        raise InvalidInput(
            "session_id_malformed",
            f"cannot read session id {text!r}: it is not ses_ and 26 characters",
            hint="`torpor ls` lists the sessions.",
        )
    return SessionId(text)
