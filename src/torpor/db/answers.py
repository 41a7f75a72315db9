"""A closed attempt's answer as one row: its raw bytes, compressed where that helps, and where its chunks end.

The row takes the place of the chunk rows in the transaction that closes the attempt, so a crash leaves the one or the
other, never both. What reads it gets the same chunks: the bytes on an agent's socket go by them.
"""

from collections.abc import Sequence

from torpor.core.errors import Damaged
from torpor.core.ids import CallId, SessionId
from torpor.db.call_rows import Chunk
from torpor.db.compression import REDACTED, decode, encode
from torpor.db.database import Row, Transaction
from torpor.db.fence import refusal

PACKED_BYTES_MAX = 8 << 20
"""Longer answers stay rows: packing one would keep every other writer waiting."""


def pack(tx: Transaction, *, session_id: SessionId, owner_token: int, call_id: CallId, attempt: int) -> None:
    """Put the chunks of an attempt that has just been closed into one row."""
    chunks = _rows(tx, call_id, attempt)
    if not 0 < sum(len(chunk.data) for chunk in chunks) <= PACKED_BYTES_MAX:
        return
    codec, data = encode(b"".join(chunk.data for chunk in chunks))
    key = {"session_id": session_id, "owner_token": owner_token, "call_id": call_id, "attempt": attempt}
    written = tx.run("call/insert_answer_fenced", **key, codec=codec, layout=pack_layout(chunks), data=data)
    if not written or not tx.run("call/delete_chunks_of_answer_fenced", **key):
        raise refusal(tx, session_id, owner_token, _damaged(call_id, "its chunks could not be packed"))


def load(tx: Transaction, call_id: CallId, attempt: int) -> tuple[list[Chunk], bool]:
    """The chunks of an attempt as far as they are written, in order; and whether bytes of them were redacted.

    Raises:
        Damaged: `answer_damaged`.
    """
    row = tx.one("call/find_answer", call_id=call_id, attempt=attempt)
    if row is None:
        return _rows(tx, call_id, attempt), False
    return _unpacked(row, call_id), row["codec"].startswith(REDACTED)


def redact(
    tx: Transaction, *, session_id: SessionId, owner_token: int, call_id: CallId, attempt: int, masked: bytes
) -> None:
    """Put masked bytes, as many as there were, in the place of an answer for good."""
    codec, data = encode(masked)
    key = {"session_id": session_id, "owner_token": owner_token, "call_id": call_id, "attempt": attempt}
    if tx.one("call/find_answer", call_id=call_id, attempt=attempt) is None:
        chunks = _rows(tx, call_id, attempt)
        tx.run("call/insert_answer_fenced", **key, codec="raw", layout=pack_layout(chunks), data=b"")
        tx.run("call/delete_chunks_of_answer_fenced", **key)
    if not tx.run("call/redact_answer_fenced", **key, codec=REDACTED + codec, data=data):
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


def _unpacked(row: Row, call_id: CallId) -> list[Chunk]:
    try:
        body = decode(row["codec"].removeprefix(REDACTED), bytes(row["data"]))
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


def _rows(tx: Transaction, call_id: CallId, attempt: int) -> list[Chunk]:
    rows = tx.all("call/list_chunks", call_id=call_id, attempt=attempt)
    return [Chunk(number=row["number"], offset_ns=row["offset_ns"], data=bytes(row["data"])) for row in rows]


def _damaged(call_id: CallId, reason: str) -> Damaged:
    return Damaged("answer_damaged", f"cannot read the answer of call {call_id}: {reason}")
