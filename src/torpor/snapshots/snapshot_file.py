"""One file that holds a snapshot and what belongs to it: records with a digest at the end, sealed if one wants.

Owns the file's bytes (docs/snapshot-file.md), not what the records mean. A reader trusts nothing: lengths are bounded,
a file that is cut off or changed is refused, at the latest at its end.
"""

import hashlib
import os
import secrets
import struct
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

from torpor.core.errors import InvalidInput
from torpor.snapshots.backend import storage_errors
from torpor.snapshots.cipher import KEY_BYTES, NONCE_BYTES, TAG_BYTES, Cipher, NotAuthentic

_MAGIC = b"TORPORSF"
_VERSION = 1
_HEAD = struct.Struct("<8sHH16s")
_RECORD = struct.Struct("<BI")
_KEY_LENGTH = struct.Struct("<H")
_SALT_BYTES = 16
_RECORD_BYTES_MAX = 256 * 1024 * 1024
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 1 << 17, 8, 1


class Record(IntEnum):
    HEAD = 1
    PROGRAM = 2
    OBJECT = 3
    LINES = 4
    END = 5


class FileWriter:
    """Writes records; the file is there when `finish` returns, and not before."""

    def __init__(self, path: Path, passphrase: bytes | None) -> None:
        """Raises MachineUnfit: no_space, storage_failed."""
        self._path = path
        self._partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        salt = secrets.token_bytes(_SALT_BYTES) if passphrase is not None else bytes(_SALT_BYTES)
        self._sealing = _Sealing(passphrase, salt)
        self._digest = hashlib.sha256()
        self._number = 0
        with storage_errors(f"write {path}"):
            descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._file = os.fdopen(descriptor, "wb")
            self._write(_HEAD.pack(_MAGIC, _VERSION, int(passphrase is not None), salt))

    def add(self, kind: Record, content: bytes) -> None:
        sealed = self._sealing.seal(kind, self._number, content)
        self._number += 1
        with storage_errors(f"write {self._path}"):
            self._write(_RECORD.pack(kind, len(sealed)))
            self._write(sealed)

    def add_object(self, key: str, data: bytes) -> None:
        self.add(Record.OBJECT, _KEY_LENGTH.pack(len(key)) + key.encode() + data)

    def finish(self) -> None:
        """Durable on return."""
        self.add(Record.END, self._digest.digest())
        with storage_errors(f"write {self._path}"):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.rename(self._path)
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def abandon(self) -> None:
        """Leave nothing; after `finish` it does nothing."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)


def read_records(file: BinaryIO, passphrase: bytes | None) -> Iterator[tuple[Record, bytes]]:
    """Every record but the end, whose digest is compared with what was read: believe nothing before it is over.

    Raises:
        InvalidInput: `snapshot_file_unreadable`, `passphrase_needed`, `passphrase_wrong`.
    """
    digest = hashlib.sha256()
    head = _read(file, _HEAD.size, digest.update)
    magic, version, is_sealed, salt = _HEAD.unpack(head)
    if magic != _MAGIC:
        raise _unreadable("it is no snapshot file")
    if version != _VERSION:
        raise _unreadable(f"it has version {version}, this Torpor reads version {_VERSION}")
    if is_sealed and passphrase is None:
        raise InvalidInput(
            "passphrase_needed", "cannot import the snapshot: the file is sealed", hint="Say --passphrase-file FILE."
        )
    sealing = _Sealing(passphrase if is_sealed else None, salt)
    number = 0
    while True:
        before = digest.digest()
        kind, length = _RECORD.unpack(_read(file, _RECORD.size, digest.update))
        if kind not in set(Record) or length > _RECORD_BYTES_MAX:
            raise _unreadable("it holds something that is no record")
        content = sealing.open(Record(kind), number, _read(file, length, digest.update))
        number += 1
        if kind == Record.END:
            if content != before:
                raise _unreadable("it is not what was written")
            if file.read(1):
                raise _unreadable("something follows its end")
            return
        yield Record(kind), content


def split_object(content: bytes) -> tuple[str, bytes]:
    """Key and bytes of an object's record.

    Raises:
        InvalidInput: `snapshot_file_unreadable`.
    """
    try:
        (length,) = _KEY_LENGTH.unpack_from(content)
        end = _KEY_LENGTH.size + length
        return content[_KEY_LENGTH.size : end].decode("ascii"), content[end:]
    except (struct.error, UnicodeDecodeError) as error:
        raise _unreadable("one of its objects has no name") from error


class _Sealing:
    """Seals the records of one file, or leaves them as they are."""

    def __init__(self, passphrase: bytes | None, salt: bytes) -> None:
        self._salt = salt
        self._cipher = None if passphrase is None else Cipher(_key_of(passphrase, salt))

    def seal(self, kind: Record, number: int, content: bytes) -> bytes:
        if self._cipher is None:
            return content
        return self._cipher.seal(number.to_bytes(NONCE_BYTES, "little"), content, self._about(kind, number))

    def open(self, kind: Record, number: int, sealed: bytes) -> bytes:
        if self._cipher is None:
            return sealed
        try:
            return self._cipher.open(number.to_bytes(NONCE_BYTES, "little"), sealed, self._about(kind, number))
        except NotAuthentic as error:
            if number == 0 and len(sealed) >= TAG_BYTES:
                raise InvalidInput(
                    "passphrase_wrong", "cannot import the snapshot: the passphrase does not open the file"
                ) from error
            raise _unreadable("it is not what was written") from error

    def _about(self, kind: Record, number: int) -> bytes:
        return self._salt + bytes([kind]) + number.to_bytes(8, "little")


def _key_of(passphrase: bytes, salt: bytes) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return Scrypt(salt=salt, length=KEY_BYTES, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P).derive(passphrase)


def _read(file: BinaryIO, length: int, note: Callable[[bytes], None]) -> bytes:
    data = file.read(length)
    if len(data) != length:
        raise _unreadable("it is cut off")
    note(data)
    return data


def _unreadable(reason: str) -> InvalidInput:
    return InvalidInput("snapshot_file_unreadable", f"cannot import the snapshot: {reason}")
