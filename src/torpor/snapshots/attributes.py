"""Extended attributes of files and directories below `user.`: what a program noted beside its bytes.

Owns their bytes in a directory object (docs/snapshot-format.md). The prefix is never stored: what a tree
holds can't name `security.capability` or another namespace in which an attribute gives a right.
"""

import errno
import os
import struct
from collections.abc import Iterator

from torpor.core.errors import Damaged, SandboxFailed

ATTRIBUTES_BYTES_MAX = 65_536
_PREFIX = b"user."
_LENGTH = struct.Struct("<I")
_NONE_HERE = (errno.EOPNOTSUPP, errno.ENOSYS)
_TOO_LARGE = (errno.E2BIG, errno.ERANGE)


def read_attributes(descriptor: int, path: bytes) -> bytes:
    """The attributes of an open file or directory, encoded; empty when it has none or its file system keeps none.

    Raises:
        SandboxFailed: workspace_too_large; the message names `path`.
    """
    try:
        names = sorted(os.fsencode(name) for name in os.listxattr(descriptor))
    except OSError as error:
        if error.errno in _NONE_HERE:
            return b""
        if error.errno in _TOO_LARGE:
            raise _too_large(path) from error
        raise
    if not names:
        return b""
    pieces: list[bytes] = []
    for name in names:
        if name.startswith(_PREFIX):
            value = os.getxattr(descriptor, name)
            short = name.removeprefix(_PREFIX)
            pieces += (bytes([len(short)]), short, _LENGTH.pack(len(value)), value)
    encoded = b"".join(pieces)
    if len(encoded) > ATTRIBUTES_BYTES_MAX:
        raise _too_large(path)
    return encoded


def write_attributes(descriptor: int, encoded: bytes) -> None:
    """Give a new file or directory its attributes.

    Raises:
        Damaged: snapshot_damaged.
        OSError: the file system keeps no attributes, or not so many.
    """
    for name, value in decode_attributes(encoded):
        os.setxattr(descriptor, _PREFIX + name, value)


def decode_attributes(encoded: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name without its prefix, value) of each.

    Raises:
        Damaged: snapshot_damaged.
    """
    at = 0
    while at < len(encoded):
        start = at + 1 + encoded[at]
        name = encoded[at + 1 : start]
        if start + _LENGTH.size > len(encoded) or not name or b"\0" in name:
            raise _damaged()
        (length,) = _LENGTH.unpack_from(encoded, start)
        start += _LENGTH.size
        at = start + length
        if at > len(encoded):
            raise _damaged()
        yield name, encoded[start:at]


def _damaged() -> Damaged:
    return Damaged("snapshot_damaged", "cannot read the attributes of a file: they are cut short")


def _too_large(path: bytes) -> SandboxFailed:
    return SandboxFailed(
        "workspace_too_large",
        f"cannot capture workspace: {path[:80]!r} has over {ATTRIBUTES_BYTES_MAX} bytes of extended attributes",
        hint="Remove some inside the sandbox; until then the session has no new checkpoints.",
    )
