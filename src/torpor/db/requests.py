"""Requests as they were received: the head as JSON, the body as pieces that come again from call to call.

A body is given back byte for byte. Its manifest's digest stands in call.intended, so the chain covers every piece.
"""

from collections import OrderedDict
from dataclasses import asdict, dataclass
from threading import Lock

from torpor.core.errors import Damaged, NotFound
from torpor.core.ids import CallId, SessionId
from torpor.db import blocks, manifests
from torpor.db.bodies import split
from torpor.db.database import Transaction
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
    """A body cut and hashed, which takes a while for a long one: do it outside the transaction (`prepare`)."""

    pieces: tuple[bytes, ...]
    digests: bytes
    body_digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRequest:
    """A request row: its head as JSON, its manifest's block, and what the body must come back as."""

    head: str
    manifest: bytes
    body_digest: str
    body_bytes: int

    @property
    def facts(self) -> dict[str, str | int]:
        """What call.intended says of it, beside the manifest in its refs."""
        head_digest = blocks.digest_of(self.head.encode()).hex()
        return {"head_digest": head_digest, "body_digest": self.body_digest, "body_bytes": self.body_bytes}


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
            blocks.put(tx, session_id=session_id, owner_token=owner_token, data=body.pieces[index], digest=piece)
        digest = blocks.put(tx, session_id=session_id, owner_token=owner_token, data=manifest.pack())
        _resolved.put(digest, manifest, body.digests)
    return StoredRequest(
        head=encode_json(asdict(head)), manifest=digest, body_digest=body.body_digest, body_bytes=body.size_bytes
    )


def attach(
    tx: Transaction, *, session_id: SessionId, owner_token: int, call_id: CallId, request: StoredRequest
) -> None:
    """Record that a call was made by this request."""
    if not tx.run(
        "request/insert_fenced", session_id=session_id, owner_token=owner_token, call_id=call_id, **asdict(request)
    ):
        raise refusal(tx, session_id, owner_token, _damaged(call_id, "it could not be stored"))


def find(tx: Transaction, call_id: CallId) -> StoredRequest | None:
    row = tx.one("request/find_by_call", call_id=call_id)
    if row is None:
        return None
    return StoredRequest(
        head=row["head"],
        manifest=bytes(row["manifest"]),
        body_digest=row["body_digest"],
        body_bytes=row["body_bytes"],
    )


def get_request(tx: Transaction, call_id: CallId) -> tuple[RequestHead, bytes]:
    """A call's request as it was received.

    Raises:
        NotFound: the call is unknown.
        Damaged: `request_damaged`, `block_damaged`.
        Conflict: `block_redacted`.
    """
    row = tx.one("request/find_by_call", call_id=call_id)
    if row is None:
        raise NotFound("request_not_found", f"cannot read the request of call {call_id}: there is none")
    session_id = SessionId(row["session_id"])
    digests = read_list(tx, session_id, row["manifest"])
    body = b"".join(
        blocks.get(tx, session_id, digests[at : at + DIGEST_BYTES]) for at in range(0, len(digests), DIGEST_BYTES)
    )
    if blocks.digest_of(body).hex() != row["body_digest"]:
        raise _damaged(call_id, "its pieces do not make up its body")
    head = decode_json(row["head"])
    headers = tuple((name, value) for name, value in head["headers"])
    return RequestHead(method=head["method"], target=head["target"], headers=headers), body


def read_list(tx: Transaction, session_id: SessionId, manifest_digest: bytes) -> bytes:
    """The digests of a body's pieces, joined, by walking from its manifest to the full one.

    Raises:
        Damaged: a manifest is missing or damaged.
    """
    chain = [read_manifest(tx, session_id, manifest_digest)]
    while (base := chain[-1].base) is not None:
        chain.append(read_manifest(tx, session_id, base))
    digests = b""
    try:
        for manifest in reversed(chain):
            digests = manifest.apply(digests)
    except ValueError as error:
        raise _unreadable(session_id, manifest_digest, error) from error
    return digests


def read_manifest(tx: Transaction, session_id: SessionId, digest: bytes) -> Manifest:
    try:
        return manifests.unpack(blocks.get(tx, session_id, digest))
    except ValueError as error:
        raise _unreadable(session_id, digest, error) from error


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
