"""Requests as they were received: the head as JSON, the body as pieces that come again from call to call.

A body is given back byte for byte. Its manifest's digest stands in call.intended, so the chain covers every piece.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from threading import Lock

from torpor.core.errors import Conflict, Damaged, NotFound
from torpor.core.ids import CallId, SessionId
from torpor.db import blocks, manifests
from torpor.db.blobs import Stored
from torpor.db.bodies import split
from torpor.db.database import Row, Transaction
from torpor.db.encoding import decode_json, encode_json
from torpor.db.fence import refusal
from torpor.db.manifests import DIGEST_BYTES, Manifest

BASES_TRIED = 8
"""Agents that take turns (a main one and its helpers) each find their own last request among so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestHead:
    """What stood before the body; the caller has taken the authorization headers out."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class PreparedBody:
    """A body cut and hashed, which takes a while for a long one: do it outside the transaction (`prepare`).

    Attributes:
        stored: by digest, the pieces that were stored ahead of the transaction (`db.ahead`).
    """

    pieces: tuple[bytes, ...]
    digests: bytes
    body_digest: str
    size_bytes: int
    stored: Mapping[bytes, Stored] = field(default_factory=dict[bytes, Stored])

    def by_digest(self) -> Iterator[tuple[bytes, bytes]]:
        """Each piece, with its digest."""
        return zip(self.pieces, pieces_of(self.digests), strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRequest:
    """A request row: the blocks of its head (JSON) and of its manifest, and what the body must come back as."""

    head_digest: bytes
    manifest: bytes
    body_digest: str
    body_bytes: int
    head_is_block: bool = True
    """The first schema kept heads in their rows."""

    @property
    def facts(self) -> dict[str, str | int]:
        """What call.intended says of it, beside the manifest in its refs."""
        head_digest = self.head_digest.hex()
        return {"head_digest": head_digest, "body_digest": self.body_digest, "body_bytes": self.body_bytes}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRequest:
    """A request as it can be read; of what was redacted, the mask. `head` is None if it is no head any more."""

    head: RequestHead | None
    body: bytes
    redacted: bool


def prepare(body: bytes) -> PreparedBody:
    """Cut a body into pieces; pieces that would not give it back are refused in favour of the raw body."""
    pieces = split(body)
    if b"".join(pieces) != body:
        pieces = [body]
    return PreparedBody(
        pieces=tuple(pieces),
        digests=b"".join(blocks.digest_of(piece) for piece in pieces),
        body_digest=blocks.digest_of(body).hex(),
        size_bytes=len(body),
    )


def store(
    tx: Transaction, *, session_id: SessionId, owner_token: int, head: RequestHead, body: PreparedBody
) -> StoredRequest:
    """Store what is new of a body, and its manifest."""
    base_digest, manifest = _choose(tx, session_id, body.digests)
    if manifest is None:
        assert base_digest is not None
        digest = base_digest
    else:
        for index in range(manifest.keep_head, manifest.keep_head + len(manifest.listed) // DIGEST_BYTES):
            piece = body.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
            blocks.put(
                tx,
                session_id=session_id,
                owner_token=owner_token,
                data=body.pieces[index],
                digest=piece,
                stored=body.stored.get(piece),
            )
        digest = blocks.put(tx, session_id=session_id, owner_token=owner_token, data=manifest.pack())
        _resolved.put(digest, manifest, body.digests)
    fields = {"method": head.method, "target": head.target, "headers": head.headers}
    text = encode_json(fields).encode()
    head_digest = blocks.put(tx, session_id=session_id, owner_token=owner_token, data=text)
    return StoredRequest(
        head_digest=head_digest, manifest=digest, body_digest=body.body_digest, body_bytes=body.size_bytes
    )


def attach(
    tx: Transaction, *, session_id: SessionId, owner_token: int, call_id: CallId, request: StoredRequest
) -> None:
    """Record that a call was made by this request."""
    if not tx.run(
        "request/insert_fenced",
        session_id=session_id,
        owner_token=owner_token,
        call_id=call_id,
        head_digest=request.head_digest,
        manifest=request.manifest,
        body_digest=request.body_digest,
        body_bytes=request.body_bytes,
    ):
        raise refusal(tx, session_id, owner_token, _damaged(call_id, "it could not be stored"))


def find(tx: Transaction, call_id: CallId) -> StoredRequest | None:
    row = tx.one("request/find_by_call", call_id=call_id)
    return None if row is None else _request_of(row)


def get_request(tx: Transaction, call_id: CallId) -> tuple[RequestHead, bytes]:
    """A call's request as it was received.

    Raises:
        NotFound: the call is unknown.
        Damaged: `request_damaged`, `block_damaged`.
        Conflict: `block_redacted`.
    """
    found = read_request(tx, call_id)
    if found.redacted or found.head is None:
        raise Conflict("block_redacted", f"cannot read the request of call {call_id}: a part of it was redacted")
    return found.head, found.body


def read_head(tx: Transaction, call_id: CallId) -> RequestHead | None:
    """A call's request line and headers; None if redaction left no head."""
    row = tx.one("request/find_by_call", call_id=call_id)
    return None if row is None else _head_of(_head_text(tx, SessionId(row["session_id"]), row).data)


def read_request(tx: Transaction, call_id: CallId) -> ReadRequest:
    """A call's request as it was received, or what redaction left of it.

    Raises:
        NotFound: the call is unknown.
        Damaged: `request_damaged`, `block_damaged`.
    """
    row = tx.one("request/find_by_call", call_id=call_id)
    if row is None:
        raise NotFound("request_not_found", f"cannot read the request of call {call_id}: there is none")
    session_id = SessionId(row["session_id"])
    pieces = pieces_of(read_list(tx, session_id, row["manifest"]))
    contents = blocks.read_many(tx, session_id, pieces)
    body = b"".join([contents[piece].data for piece in pieces])
    redacted = any(content.redacted for content in contents.values())
    if not redacted and blocks.digest_of(body).hex() != row["body_digest"]:
        for piece in contents:
            blocks.read(tx, session_id, piece)  # says which one it is
        raise _damaged(call_id, "its pieces do not make up its body")
    if redacted and len(body) != row["body_bytes"]:
        raise _damaged(call_id, "its pieces do not make up its body")
    text = _head_text(tx, session_id, row)
    return ReadRequest(head=_head_of(text.data), body=body, redacted=redacted or text.redacted)


def pieces_of(digests: bytes) -> list[bytes]:
    """A list of digests that are joined, one by one."""
    return [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)]


def read_list(tx: Transaction, session_id: SessionId, manifest_digest: bytes) -> bytes:
    """The digests of a body's pieces, joined, by walking from its manifest to the full one.

    Raises:
        Damaged: a manifest is missing or damaged.
    """
    chain: list[Manifest] = []
    digest: bytes | None = manifest_digest
    while digest is not None:
        for content_digest, data in blocks.read_chain(tx, session_id, digest):
            try:
                chain.append(manifests.unpack(data))
            except ValueError as error:
                raise _unreadable(session_id, content_digest, error) from error
        digest = chain[-1].base
    try:
        return manifests.resolve(chain)
    except ValueError as error:
        raise _unreadable(session_id, manifest_digest, error) from error


def read_manifest(tx: Transaction, session_id: SessionId, digest: bytes) -> Manifest:
    try:
        return manifests.unpack(blocks.get(tx, session_id, digest))
    except ValueError as error:
        raise _unreadable(session_id, digest, error) from error


def _request_of(row: Row) -> StoredRequest:
    head_digest = row["head_digest"] or blocks.digest_of(row["head"].encode())
    return StoredRequest(
        head_digest=bytes(head_digest),
        manifest=bytes(row["manifest"]),
        body_digest=row["body_digest"],
        body_bytes=row["body_bytes"],
        head_is_block=row["head_digest"] is not None,
    )


def _head_text(tx: Transaction, session_id: SessionId, row: Row) -> blocks.Content:
    if row["head_digest"] is None:
        return blocks.Content(row["head"].encode(), redacted=False)
    return blocks.read(tx, session_id, bytes(row["head_digest"]))


def _head_of(text: bytes) -> RequestHead | None:
    try:
        head = decode_json(text.decode())
        headers = tuple((str(name), str(value)) for name, value in head["headers"])
        return RequestHead(method=head["method"], target=head["target"], headers=headers)
    except (ValueError, TypeError, KeyError):
        return None  # redaction went through its middle


def _choose(tx: Transaction, session_id: SessionId, digests: bytes) -> tuple[bytes | None, Manifest | None]:
    """The base to write against, with the new manifest; no manifest if the base is the very same list."""
    best: Manifest | None = None
    for row in tx.all("request/list_recent_manifests", session_id=session_id, row_limit=BASES_TRIED):
        base_digest = bytes(row["manifest"])
        base, base_list = _resolve(tx, session_id, base_digest)
        if base_list == digests:
            return base_digest, None
        candidate = manifests.delta(digests, base_digest=base_digest, base=base, base_list=base_list)
        if best is None or len(candidate.listed) < len(best.listed):
            best = candidate
        if len(best.listed) * 2 < len(digests):
            break
    best = best or manifests.full(digests)
    return best.base, best


def _resolve(tx: Transaction, session_id: SessionId, digest: bytes) -> tuple[Manifest, bytes]:
    known = _resolved.get(digest)
    if known is None:
        known = (read_manifest(tx, session_id, digest), read_list(tx, session_id, digest))
        _resolved.put(digest, *known)
    return known


class _Resolved:
    """The lists of recent manifests, by digest: what a digest stands for never changes, so no entry is ever wrong."""

    ENTRIES_MAX = 64

    def __init__(self) -> None:
        self._lock = Lock()
        self._lists: OrderedDict[bytes, tuple[Manifest, bytes]] = OrderedDict()

    def get(self, digest: bytes) -> tuple[Manifest, bytes] | None:
        with self._lock:
            return self._lists.get(digest)

    def put(self, digest: bytes, manifest: Manifest, digests: bytes) -> None:
        with self._lock:
            self._lists[digest] = (manifest, digests)
            self._lists.move_to_end(digest)
            if len(self._lists) > self.ENTRIES_MAX:
                self._lists.popitem(last=False)


_resolved = _Resolved()


def _unreadable(session_id: SessionId, digest: bytes, error: ValueError) -> Damaged:
    return Damaged("block_damaged", f"cannot read manifest {digest.hex()} of session {session_id}: {error}")


def _damaged(call_id: CallId, reason: str) -> Damaged:
    return Damaged("request_damaged", f"cannot read the request of call {call_id}: {reason}")
