"""Content-addressed blocks of a session: what requests are made of. Compressed when that helps.

A block belongs to one session, so forgetting a session removes its last byte, and nothing can be learnt from another
session's blocks. A redacted block keeps its digest and its length; of its content only a mask is left, and putting it
again does not bring it back.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torpor.core.errors import Conflict, Damaged
from torpor.core.ids import SessionId
from torpor.db.blobs import Stored, bytes_of, in_row
from torpor.db.compression import REDACTED, decode
from torpor.db.database import Row, Transaction
from torpor.db.fence import held_row, refusal

_AT_ONCE = 64
"""As many as block/list_some takes."""
_CHAIN_MAX = 100_000


@dataclass(frozen=True, slots=True)
class Content:
    """A block as it can be read: what was written, or what redaction left of it."""

    data: bytes
    redacted: bool


def digest_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def put(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    data: bytes,
    digest: bytes | None = None,
    stored: Stored | None = None,
) -> bytes:
    """Store `data` unless it is there, and return its SHA-256 digest (which the caller may know already).

    Args:
        stored: `data` as it was stored ahead of this transaction, if it was.
    """
    digest = digest or digest_of(data)
    if not is_there(tx, session_id, digest):
        if not tx.run(
            "block/insert_fenced",
            session_id=session_id,
            owner_token=owner_token,
            digest=digest,
            size_bytes=len(data),
            **(stored or in_row(data)).columns,
        ):
            raise refusal(tx, session_id, owner_token, _damaged(session_id, digest, "it is there and is not"))
    else:
        held_row(tx, session_id, owner_token)
    return digest


def is_there(tx: Transaction, session_id: SessionId, digest: bytes) -> bool:
    return tx.one("block/find_codec", session_id=session_id, digest=digest) is not None


def get(tx: Transaction, session_id: SessionId, digest: bytes) -> bytes:
    """The content of a block, checked against its digest.

    Raises:
        Damaged: `block_damaged`, it is missing or is not what was written.
        Conflict: `block_redacted`.
    """
    content = read(tx, session_id, digest)
    if content.redacted:
        raise redacted(session_id, digest)
    return content.data


def read(tx: Transaction, session_id: SessionId, digest: bytes) -> Content:
    """The content of a block, or what is left of it.

    Raises:
        Damaged: `block_damaged`.
    """
    row = tx.one("block/find", session_id=session_id, digest=digest)
    if row is None:
        raise _damaged(session_id, digest, "it is missing")
    content = _content_of(tx, row, session_id, digest)
    if not content.redacted and digest_of(content.data) != digest:
        raise _damaged(session_id, digest, "its bytes are not what was written")
    return content


def read_many(tx: Transaction, session_id: SessionId, digests: Iterable[bytes]) -> dict[bytes, Content]:
    """Blocks by digest, a batch at a time. Their bytes are NOT checked: the caller knows the digest of the whole.

    Raises:
        Damaged: `block_damaged`, one is missing or unreadable.
    """
    wanted = list(dict.fromkeys(digests))
    found: dict[bytes, Content] = {}
    for at in range(0, len(wanted), _AT_ONCE):
        batch = wanted[at : at + _AT_ONCE]
        for row in tx.all("block/list_some", session_id=session_id, **_named(batch)):
            digest = bytes(row["digest"])
            found[digest] = _content_of(tx, row, session_id, digest)
    for digest in wanted:
        if digest not in found:
            raise _damaged(session_id, digest, "it is missing")
    return found


def read_chain(tx: Transaction, session_id: SessionId, digest: bytes) -> list[tuple[bytes, bytes]]:
    """A manifest's block and those of its bases, each checked; at least the first, and not always all.

    A manifest is too short to be a blob (PIECES_MAX bounds it), so all of them are in their rows.

    Raises:
        Damaged: `block_damaged`.
    """
    found: list[tuple[bytes, bytes]] = []
    for row in tx.all("block/list_chain", session_id=session_id, digest=digest, depth_max=_CHAIN_MAX):
        link = bytes(row["digest"])
        data = _content_of(tx, row, session_id, link).data
        if digest_of(data) != link:
            raise _damaged(session_id, link, "its bytes are not what was written")
        found.append((link, data))
        if row["codec"] != "raw":
            break  # what the statement took for its base's digest is none
    if not found:
        raise _damaged(session_id, digest, "it is missing")
    return found


def redact(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    digest: bytes,
    masked: bytes,
    stored: Stored | None = None,
) -> None:
    """Leave only `masked` of a block's content, for good; the event chain stays valid, since it holds digests only.

    Args:
        stored: `masked` as it was stored ahead of this transaction, if it was.
    """
    stored = stored or in_row(masked)
    key = {"session_id": session_id, "owner_token": owner_token, "digest": digest}
    if not tx.run("block/redact_fenced", **key, **{**stored.columns, "codec": REDACTED + stored.codec}):
        raise refusal(tx, session_id, owner_token, _damaged(session_id, digest, "it is missing"))


def redacted(session_id: SessionId, digest: bytes) -> Conflict:
    return Conflict("block_redacted", f"cannot read block {digest.hex()} of session {session_id}: it was redacted")


def _named(batch: Sequence[bytes]) -> dict[str, bytes]:
    return {f"d{number}": batch[min(number, len(batch) - 1)] for number in range(_AT_ONCE)}


def _content_of(tx: Transaction, row: Row, session_id: SessionId, digest: bytes) -> Content:
    codec: str = row["codec"]
    redacted = codec.startswith(REDACTED)
    try:
        stored = row["data"] if row["blob"] is None else bytes_of(tx, session_id, row)
        return Content(decode(codec.removeprefix(REDACTED) if redacted else codec, stored), redacted)
    except ValueError as error:
        raise _damaged(session_id, digest, str(error)) from error


def _damaged(session_id: SessionId, digest: bytes, reason: str) -> Damaged:
    return Damaged("block_damaged", f"cannot read block {digest.hex()} of session {session_id}: {reason}")
