"""How content is stored: in its row, or, if it is large, as a blob that the row names (docs/event-log.md).

A blob is an immutable object of the store beside the database, named by its session and the SHA-256 of its bytes as
stored. So it belongs to one session, and whoever forgets or redacts it asks nobody else. It is put before the
transaction that names it (`db.ahead`), and deleted after the one that no longer does.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torpor.core.crash import crash_point
from torpor.core.errors import NotFound
from torpor.core.ids import SessionId
from torpor.db.compression import encode
from torpor.db.database import BlobStore, Row, Transaction

BLOB_BYTES_MIN = 1 << 20
"""What has as many bytes when it is stored lies outside of the database."""

_KIND = "blobs/"


@dataclass(frozen=True, slots=True)
class Stored:
    """Content as its row will have it.

    Attributes:
        data: the bytes as stored; nothing if they are a blob.
        blob: SHA-256 of the bytes as stored, if they are a blob.
    """

    codec: str
    data: bytes
    blob: bytes | None = None

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"codec": self.codec, "data": self.data, "blob": self.blob}


def in_row(content: bytes) -> Stored:
    return Stored(*encode(content))


def store(blobs: BlobStore | None, session_id: SessionId, content: bytes) -> Stored:
    """Compress content, and make it durable as a blob if it is large. Slow: for a thread of its own, in no transaction.

    Raises:
        MachineUnfit: `no_space`, `storage_failed`.
    """
    stored = in_row(content)
    if blobs is None or len(stored.data) < BLOB_BYTES_MIN:
        return stored
    digest = hashlib.sha256(stored.data).digest()
    put(blobs, session_id, digest, stored.data)
    crash_point("blob.stored")
    return Stored(stored.codec, b"", digest)


def put(blobs: BlobStore, session_id: SessionId, digest: bytes, data: bytes) -> None:
    """Make a blob durable. One that is there and is not what its name says is put anew."""
    key = key_of(session_id, digest)
    if not blobs.put(key, data) and not _is_whole(blobs, key, digest):
        blobs.delete(key)
        blobs.put(key, data)


def bytes_of(tx: Transaction, session_id: SessionId, row: Row) -> bytes:
    """The bytes of a row, as stored, from wherever they are.

    Raises:
        ValueError: they are a blob that is missing, or not what was written.
    """
    digest: bytes | None = row["blob"]
    if digest is None:
        return row["data"]
    try:
        data = tx.fetch(key_of(session_id, digest))
    except NotFound as error:
        raise ValueError(f"its blob {digest.hex()} is missing from the store") from error
    if hashlib.sha256(data).digest() != digest:
        raise ValueError(f"its blob {digest.hex()} is not what was written")
    return data


def key_of(session_id: SessionId, digest: bytes) -> str:
    return f"{prefix_of(session_id)}{digest.hex()}"


def prefix_of(session_id: SessionId) -> str:
    """What the keys of a session's blobs begin with."""
    return f"{_KIND}{session_id.removeprefix('ses_')}_"


def list_named(tx: Transaction) -> set[str]:
    """The keys that rows name, of every session: what a collection keeps.

    Whoever deletes others has to keep nodes from writing meanwhile, or to wait: a blob is put before its row.
    """
    return _keys(tx.all("blob/list_named"))


def list_named_of(tx: Transaction, session_id: SessionId) -> set[str]:
    return _keys(tx.all("blob/list_named_of_session", session_id=session_id))


def _keys(rows: Iterable[Row]) -> set[str]:
    return {key_of(SessionId(row["session_id"]), bytes(row["blob"])) for row in rows}


def _is_whole(blobs: BlobStore, key: str, digest: bytes) -> bool:
    try:
        return hashlib.sha256(blobs.get(key)).digest() == digest
    except NotFound:
        return False
