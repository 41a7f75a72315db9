"""Encryption for everything that the store keeps: sealing bytes, deriving keys, wrapping one key by another.

AES-256-GCM and HKDF of `cryptography`; nothing is made of parts here. Which key seals what, and why no nonce is used
twice under one key, is in docs/snapshot-format.md. A key never shows itself: not in a repr, not in an error. The
library is imported when it is first needed, because most commands read no snapshot.
"""

import secrets
from dataclasses import dataclass, field

from torpor.core.ids import KeyId

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
KEY_ID_BYTES = 8
_PREFIX = "key_"


class NotAuthentic(Exception):
    """Sealed bytes are not what this key sealed: another key, or other bytes. Whoever reads them says which object."""


class Cipher:
    """Seals and opens under one key."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._gcm = AESGCM(key)

    def seal(self, nonce: bytes, data: bytes, about: bytes) -> bytes:
        """Encrypt; `about` is not part of the result, and has to be the same at its opening."""
        return self._gcm.encrypt(nonce, data, about)

    def open(self, nonce: bytes, sealed: bytes | memoryview, about: bytes) -> bytes:
        """Raises NotAuthentic."""
        from cryptography.exceptions import InvalidTag

        try:
            return self._gcm.decrypt(nonce, sealed, about)
        except (InvalidTag, ValueError) as error:  # The second: what is there is too short to have a nonce.
            raise NotAuthentic from error


@dataclass(frozen=True, slots=True)
class Key:
    """A secret of 32 bytes with the id that speaks of it."""

    id: KeyId
    secret: bytes = field(repr=False)


def new_key() -> Key:
    return key_of(secrets.token_bytes(KEY_BYTES))


def key_of(secret: bytes) -> Key:
    """Give a secret its id."""
    return Key(KeyId(_PREFIX + derive(secret, "key id", KEY_ID_BYTES).hex()), secret)


def key_id_bytes(key_id: KeyId) -> bytes:
    """An id as a head has it."""
    return bytes.fromhex(key_id.removeprefix(_PREFIX))


def key_id_of_bytes(data: bytes) -> KeyId:
    return KeyId(_PREFIX + data.hex())


def derive(secret: bytes, purpose: str, length: int = KEY_BYTES) -> bytes:
    """A key for one purpose; keys of different purposes tell nothing of each other, nor of the secret."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

    return HKDFExpand(SHA256(), length, f"torpor/2 {purpose}".encode()).derive(secret)


def wrap(master: Key, key: Key, about: str) -> bytes:
    """A key as a database may keep it; `about` says whose key it is."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + Cipher(derive(master.secret, "wrap")).seal(nonce, key.secret, about.encode())


def unwrap(master: Key, wrapped: bytes, about: str) -> Key:
    """Raises NotAuthentic."""
    nonce, sealed = wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:]
    return key_of(Cipher(derive(master.secret, "wrap")).open(nonce, sealed, about.encode()))
