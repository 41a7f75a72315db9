"""Signed heads: who has one can tell later whether the log up to there is still the one that was signed.

The chain alone shows that a log fits itself; somebody who rewrites all of it has a chain too. A signature, kept
somewhere else, is what they have not.
"""

import base64
import binascii
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torpor.core.errors import Damaged, InvalidInput, NotFound
from torpor.core.events import canonical_json
from torpor.core.ids import SessionId
from torpor.db import log, sessions
from torpor.db.database import Transaction

_FORMAT = "torpor-head-1"
_SIGNED = ("format", "session", "seq", "hash")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The last event of a log, whose hash covers all before it."""

    session_id: SessionId
    seq: int
    hash: str

    @property
    def fields(self) -> dict[str, Any]:
        return {"format": _FORMAT, "session": self.session_id, "seq": self.seq, "hash": self.hash}


def read_head(tx: Transaction, session_id: SessionId) -> Head:
    session = sessions.get(tx, session_id)
    return Head(session_id=session_id, seq=session.head_seq, hash=session.head_hash)


def new_key(path: Path) -> None:
    """Write a new Ed25519 key, readable by its owner alone.

    Raises:
        InvalidInput: `key_unusable`, there is a file already, or it can't be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise _key_unusable(path, error.strerror or str(error)) from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)


def sign(head: Head, key: Path) -> dict[str, Any]:
    """The head with its signature and the key that checks it.

    Raises:
        InvalidInput: `key_unusable`.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        if key.stat().st_mode & 0o077:
            raise _key_unusable(key, "others than its owner may read it")
        private = load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise _key_unusable(key, getattr(error, "strerror", None) or "it holds no key in PEM") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise _key_unusable(key, "it is no Ed25519 key")
    signature = private.sign(_statement(head.fields))
    public = private.public_key().public_bytes_raw()
    return {**head.fields, "key": _text(public), "signature": _text(signature)}


def check(tx: Transaction, session_id: SessionId, signed: Mapping[str, Any], *, key: str | None) -> Head:
    """Whether a signed head is one of this log, and signed by `key` (base64; by the key that it names if None).

    Raises:
        InvalidInput: `signature_unusable`, it is no signed head.
        Damaged: `signature_wrong`, it is not that key's, or the log says something else at that seq.
        NotFound: `event_not_found`, the log is shorter.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        fields = {name: signed[name] for name in _SIGNED}
        public = base64.b64decode(key or signed["key"], validate=True)
        checker = Ed25519PublicKey.from_public_bytes(public)
        signature = base64.b64decode(signed["signature"], validate=True)
        head = Head(session_id=SessionId(fields["session"]), seq=int(fields["seq"]), hash=str(fields["hash"]))
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise InvalidInput("signature_unusable", "cannot check the signature: it is no signed head") from error
    try:
        checker.verify(signature, _statement(fields))
    except InvalidSignature as error:
        raise _wrong(session_id, "the signature is not that key's") from error
    if fields["format"] != _FORMAT or head.session_id != session_id:
        raise _wrong(session_id, f"it is one of {head.session_id}")
    found = log.events(tx, session_id, after_seq=head.seq - 1, limit=1)
    if not found:
        raise NotFound("event_not_found", f"cannot find event {head.seq} of session {session_id}: the log is shorter")
    if (found[0].seq, found[0].hash) != (head.seq, head.hash):
        raise _wrong(session_id, f"event {head.seq} is another one")
    return head


def _statement(fields: Mapping[str, Any]) -> bytes:
    return canonical_json(dict(fields)).encode()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _wrong(session_id: SessionId, reason: str) -> Damaged:
    return Damaged("signature_wrong", f"cannot trust the log of session {session_id} by this signature: {reason}")


def _key_unusable(path: Path, reason: str) -> InvalidInput:
    return InvalidInput("key_unusable", f"cannot use key {path}: {reason}")
