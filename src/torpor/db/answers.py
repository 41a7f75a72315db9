"""A closed attempt's answer as one row: its raw bytes, compressed where that helps, and where its chunks end.

The row takes the place of the chunk rows in the transaction that closes the attempt, so a crash leaves the one or the
other. Those of a long answer, whose row is made ahead, are dropped afterwards, a few at a time: a crash then leaves
some, which nobody reads. What reads it gets the same chunks: the bytes on an agent's socket go by them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torpor.core.errors import Damaged
from torpor.core.ids import CallId, SessionId
from torpor.db.blobs import Stored, bytes_of, in_row
from torpor.db.call_rows import Chunk, body_facts
from torpor.db.compression import REDACTED, decode
from torpor.db.database import Row, Transaction
from torpor.db.fence import refusal

PACKED_HERE_BYTES_MAX = 8 << 20
"""Longer answers are not packed within the transaction that closes their attempt: every other writer would wait."""
DROPPED_BYTES_MAX = 1 << 20
"""So much of an answer's chunk rows is dropped in one transaction, which overwrites them with zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """An answer, as far as it got, in the form of its row.

    Attributes:
        facts: `body_facts` of its chunks.
        stored: its bytes; None leaves them in the chunk rows.
        ahead: they were stored before the transaction that closes the attempt; its chunks are dropped after it.
    """

    call_id: CallId
    attempt: int
    facts: Mapping[str, Any]
    layout: bytes
    stored: Stored | None
    ahead: bool = False


def read(tx: Transaction, call_id: CallId, attempt: int) -> tuple[Packed, bytes]:
    """An attempt that is not closed, without its stored form, and its bytes."""
    chunks = _rows(tx, call_id, attempt)
    body = b"".join(chunk.data for chunk in chunks)
    facts, layout = body_facts(chunks), pack_layout(chunks)
    return Packed(call_id=call_id, attempt=attempt, facts=facts, layout=layout, stored=None), body


def pack(tx: Transaction, call_id: CallId, attempt: int) -> Packed:
    """The same, packed within the transaction that will close it."""
    packed, body = read(tx, call_id, attempt)
    return replace(packed, stored=in_row(body)) if 0 < len(body) <= PACKED_HERE_BYTES_MAX else packed


def is_still(tx: Transaction, packed: Packed) -> bool:
    """Whether an attempt has the chunks of which `packed` was made: they are only ever added to."""
    row = tx.one("call/count_chunks", call_id=packed.call_id, attempt=packed.attempt)
    return row is not None and row["chunk_count"] == packed.facts["chunks"]


def store(tx: Transaction, *, session_id: SessionId, owner_token: int, packed: Packed) -> None:
    """Write the row of an attempt that has just been closed, in the place of its chunks."""
    if packed.stored is None:
        return
    key = {"call_id": packed.call_id, "attempt": packed.attempt}
    owner = {"session_id": session_id, "owner_token": owner_token}
    written = tx.run("call/insert_answer_fenced", **owner, **key, layout=packed.layout, **packed.stored.columns)
    if not written or not (packed.ahead or tx.run("call/delete_chunks_of_answer_fenced", **owner, **key)):
        raise refusal(tx, session_id, owner_token, _damaged(packed.call_id, "its chunks could not be packed"))


def batches(tx: Transaction, call_id: CallId, attempt: int) -> Iterator[int]:
    """The last chunk of each batch in which those of an answer are dropped; none if they are all it has."""
    size = 0
    rows = tx.all("call/list_chunk_sizes", call_id=call_id, attempt=attempt)
    for row in rows:
        size += row["size_bytes"]
        if size >= DROPPED_BYTES_MAX or row is rows[-1]:
            yield row["number"]
            size = 0


def drop_chunks(
    tx: Transaction, *, session_id: SessionId, owner_token: int, call_id: CallId, attempt: int, last: int
) -> None:
    """Drop chunks, up to a number, whose bytes are in the answer's row or blob."""
    key = {"session_id": session_id, "owner_token": owner_token, "call_id": call_id, "attempt": attempt}
    if not tx.run("call/delete_first_chunks_fenced", **key, last=last):
        raise refusal(tx, session_id, owner_token, _damaged(call_id, "its chunks could not be dropped"))


def list_with_chunks(tx: Transaction, session_id: SessionId) -> list[tuple[CallId, int]]:
    """Answers whose chunks are not all dropped yet."""
    rows = tx.all("call/list_answers_with_chunks", session_id=session_id)
    return [(CallId(row["call_id"]), row["attempt"]) for row in rows]


def load(tx: Transaction, call_id: CallId, attempt: int) -> tuple[list[Chunk], bool]:
    """The chunks of an attempt as far as they are written, in order; and whether bytes of them were redacted.

    Raises:
        Damaged: `answer_damaged`.
    """
    row = tx.one("call/find_answer", call_id=call_id, attempt=attempt)
    if row is None:
        return _rows(tx, call_id, attempt), False
    return _unpacked(tx, row, call_id), row["codec"].startswith(REDACTED)


def redact(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    call_id: CallId,
    attempt: int,
    masked: bytes,
    stored: Stored | None = None,
) -> None:
    """Put masked bytes, as many as there were, in the place of an answer for good.

    Args:
        stored: `masked` as it was stored ahead of this transaction, if it was.
    """
    stored = stored or in_row(masked)
    key = {"session_id": session_id, "owner_token": owner_token, "call_id": call_id, "attempt": attempt}
    if tx.one("call/find_answer", call_id=call_id, attempt=attempt) is None:
        layout = pack_layout(_rows(tx, call_id, attempt))
        tx.run("call/insert_answer_fenced", **key, layout=layout, **Stored("raw", b"").columns)
    tx.run("call/delete_chunks_of_answer_fenced", **key)
    if not tx.run("call/redact_answer_fenced", **key, **{**stored.columns, "codec": REDACTED + stored.codec}):
        raise refusal(tx, session_id, owner_token, _damaged(call_id, "its answer could not be redacted"))


def pack_layout(chunks: Sequence[Chunk]) -> bytes:
    """For each chunk two numbers: nanoseconds since the one before, and its length.

    Numbers are LEB128 (seven bits a byte, lowest first, the eighth says that more follow). A chunk that the clock put
    before its predecessor has its time doubled and odd; others doubled and even (zigzag).
    """
    packed = bytearray()
    before = 0
    for chunk in chunks:
        step = chunk.offset_ns - before
        before = chunk.offset_ns
        for number in (step << 1 if step >= 0 else (-step << 1) - 1, len(chunk.data)):
            rest = number
            while rest > 0x7F:
                packed.append(rest & 0x7F | 0x80)
                rest >>= 7
            packed.append(rest)
    return bytes(packed)


def unpack_layout(layout: bytes) -> list[tuple[int, int]]:
    """Each chunk's offset in nanoseconds, and its length.

    Raises:
        ValueError: it is cut off.
    """
    numbers: list[int] = []
    number = shift = 0
    for byte in layout:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(number)
            number = shift = 0
    if shift or len(numbers) % 2:
        raise ValueError("its layout is cut off")
    pairs: list[tuple[int, int]] = []
    offset = 0
    for step, length in zip(numbers[::2], numbers[1::2], strict=True):
        offset += step >> 1 if step % 2 == 0 else -((step + 1) >> 1)
        pairs.append((offset, length))
    return pairs


def _unpacked(tx: Transaction, row: Row, call_id: CallId) -> list[Chunk]:
    try:
        body = decode(row["codec"].removeprefix(REDACTED), _stored_bytes(tx, row, call_id))
        layout = unpack_layout(bytes(row["layout"]))
    except ValueError as error:
        raise _damaged(call_id, str(error)) from error
    if sum(length for _, length in layout) != len(body):
        raise _damaged(call_id, "its layout is not that of its bytes")
    chunks: list[Chunk] = []
    at = 0
    for number, (offset_ns, length) in enumerate(layout):
        chunks.append(Chunk(number=number, offset_ns=offset_ns, data=body[at : at + length]))
        at += length
    return chunks


def _stored_bytes(tx: Transaction, row: Row, call_id: CallId) -> bytes:
    if row["blob"] is None:
        return bytes(row["data"])
    call = tx.one("call/find_by_id", call_id=call_id)
    assert call is not None, "an answer's row refers to its call's"
    return bytes_of(tx, SessionId(call["session_id"]), row)


def _rows(tx: Transaction, call_id: CallId, attempt: int) -> list[Chunk]:
    rows = tx.all("call/list_chunks", call_id=call_id, attempt=attempt)
    return [Chunk(number=row["number"], offset_ns=row["offset_ns"], data=bytes(row["data"])) for row in rows]


def _damaged(call_id: CallId, reason: str) -> Damaged:
    return Damaged("answer_damaged", f"cannot read the answer of call {call_id}: {reason}")
