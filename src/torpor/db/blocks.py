"""Content-addressed blocks of a session: what request bodies are made of. Compressed when that helps.

A block belongs to one session, so forgetting a session removes its last byte, and nothing can be learnt from another
session's blocks. A redacted block keeps its digest and loses its content; putting it again does not bring it back.
"""

import hashlib

import zstandard

from torpor.core.errors import Conflict, Damaged
from torpor.core.ids import SessionId
from torpor.db.database import Transaction
from torpor.db.fence import held_row, refusal

BLOCK_BYTES_MAX = 1 << 30
_COMPRESS_FROM_BYTES = 128
_ZSTD_LEVEL = 3


def digest_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def put(tx: Transaction, *, session_id: SessionId, owner_token: int, data: bytes, digest: bytes | None = None) -> bytes:
    """Store `data` unless it is there, and return its SHA-256 digest (which the caller may know already)."""
    digest = digest or digest_of(data)
    if tx.one("block/find_codec", session_id=session_id, digest=digest) is None:
        codec, stored = _encode(data)
        if not tx.run(
            "block/insert_fenced",
            session_id=session_id,
            owner_token=owner_token,
            digest=digest,
            codec=codec,
            size_bytes=len(data),
            data=stored,
        ):
            raise refusal(tx, session_id, owner_token, _damaged(session_id, digest, "it is there and is not"))
    else:
        held_row(tx, session_id, owner_token)
    return digest


def get(tx: Transaction, session_id: SessionId, digest: bytes) -> bytes:
    """The content of a block, checked against its digest.

    Raises:
        Damaged: `block_damaged`, it is missing or is not what was written.
        Conflict: `block_redacted`.
    """
    row = tx.one("block/find", session_id=session_id, digest=digest)
    if row is None:
        raise _damaged(session_id, digest, "it is missing")
    if row["codec"] == "redacted":
        raise Conflict("block_redacted", f"cannot read block {digest.hex()} of session {session_id}: it was redacted")
    try:
        data = _decode(row["codec"], row["data"])
    except (zstandard.ZstdError, ValueError) as error:
        raise _damaged(session_id, digest, str(error)) from error
    if digest_of(data) != digest:
        raise _damaged(session_id, digest, "its bytes are not what was written")
    return data


def redact(tx: Transaction, *, session_id: SessionId, owner_token: int, digest: bytes) -> None:
    """Erase a block's content for good; the event chain stays valid, since it holds digests only."""
    if not tx.run("block/redact_fenced", session_id=session_id, owner_token=owner_token, digest=digest, nothing=b""):
        raise refusal(tx, session_id, owner_token, _damaged(session_id, digest, "it is missing"))


def _encode(data: bytes) -> tuple[str, bytes]:
    if len(data) >= _COMPRESS_FROM_BYTES:
        packed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=True).compress(data)
        if len(packed) < len(data) - len(data) // 16:
            return "zstd", packed
    return "raw", data


def _decode(codec: str, stored: bytes) -> bytes:
    match codec:
        case "raw":
            return stored
        case "zstd":
            if zstandard.frame_content_size(stored) > BLOCK_BYTES_MAX:
                raise ValueError("its size is beyond all bounds")
            return zstandard.ZstdDecompressor().decompress(stored, max_output_size=BLOCK_BYTES_MAX)
        case _:
            raise ValueError(f"its codec {codec!r} is unknown")


def _damaged(session_id: SessionId, digest: bytes, reason: str) -> Damaged:
    return Damaged("block_damaged", f"cannot read block {digest.hex()} of session {session_id}: {reason}")
