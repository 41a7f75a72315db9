"""Manifests: the list of a body's pieces, written against the list of an earlier body. Pure; the bytes are a block.

    magic "TM1\\0"  4
    base           32   digest of the base's manifest, zeros: none, then all pieces are listed here
    chain_length    4   manifests from here to the full one
    chain_cost      4   pieces listed in them, plus one each
    keep_head       4   pieces taken from the front of the base's list
    keep_tail       4   pieces taken from its end; numbers are big-endian
    listed       32*n   digests that stand between the two

A full list is written again when the chain is long and costs half as much as the list: so storage grows with what is
new, and reading costs a small multiple of the list.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

DIGEST_BYTES = 32
CHAIN_LENGTH_MIN = 64

_HEADER = struct.Struct(">4s32sIIII")
_MAGIC = b"TM1\0"
_NO_BASE = bytes(DIGEST_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One manifest as it is stored; `listed` is the digests joined."""

    base: bytes | None
    chain_length: int
    chain_cost: int
    keep_head: int
    keep_tail: int
    listed: bytes

    def pack(self) -> bytes:
        base = self.base or _NO_BASE
        header = (_MAGIC, base, self.chain_length, self.chain_cost, self.keep_head, self.keep_tail)
        return _HEADER.pack(*header) + self.listed

    @property
    def pieces(self) -> int:
        """How many pieces the whole list has."""
        return self.keep_head + len(self.listed) // DIGEST_BYTES + self.keep_tail


def unpack(data: bytes) -> Manifest:
    """Parse a manifest's block.

    Raises:
        ValueError: it is none.
    """
    if len(data) < _HEADER.size or (len(data) - _HEADER.size) % DIGEST_BYTES:
        raise ValueError("a manifest is cut off")
    magic, base, chain_length, chain_cost, keep_head, keep_tail = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError("a manifest has another version")
    return Manifest(
        base=None if base == _NO_BASE else base,
        chain_length=chain_length,
        chain_cost=chain_cost,
        keep_head=keep_head,
        keep_tail=keep_tail,
        listed=data[_HEADER.size :],
    )


def resolve(chain: Sequence[Manifest]) -> bytes:
    """The whole list of the first manifest of a chain, each of which stands against the next; the last lists all.

    Goes down the chain with the ranges that are still open, so it takes the time of what is listed, not of every
    list on the way.

    Raises:
        ValueError: a manifest keeps more than its base has, or the chain does not end in a full one.
    """
    found: list[tuple[int, bytes]] = []
    # (place in the result, first, last): pieces of the present manifest's list that are wanted and not found yet.
    wanted = [(0, 0, chain[0].pieces)]
    for manifest, base in zip(chain, [*chain[1:], None], strict=True):
        base_pieces = 0 if base is None else base.pieces
        if manifest.keep_head + manifest.keep_tail > base_pieces:
            raise ValueError("a manifest keeps more than its base has")
        tail = manifest.pieces - manifest.keep_tail
        below: list[tuple[int, int, int]] = []
        for place, first, last in wanted:
            if first < manifest.keep_head:
                below.append((place, first, min(last, manifest.keep_head)))
            low, high = max(first, manifest.keep_head), min(last, tail)
            if low < high:
                start, end = low - manifest.keep_head, high - manifest.keep_head
                found.append((place + low - first, manifest.listed[start * DIGEST_BYTES : end * DIGEST_BYTES]))
            if last > tail:
                low = max(first, tail)
                shift = base_pieces - manifest.pieces
                below.append((place + low - first, low + shift, last + shift))
        wanted = below
    if wanted:
        raise ValueError("a chain of manifests has no end")
    return b"".join(listed for _, listed in sorted(found))


def full(digests: bytes) -> Manifest:
    return Manifest(base=None, chain_length=0, chain_cost=0, keep_head=0, keep_tail=0, listed=digests)


def delta(digests: bytes, *, base_digest: bytes, base: Manifest, base_list: bytes) -> Manifest:
    """The manifest of `digests` against a base, or the full one where that is the better one."""
    head, tail = shared(digests, base_list)
    listed = digests[head * DIGEST_BYTES : len(digests) - tail * DIGEST_BYTES]
    pieces = len(digests) // DIGEST_BYTES
    cost = base.chain_cost + len(listed) // DIGEST_BYTES + 1
    if head + tail == 0 or (base.chain_length >= CHAIN_LENGTH_MIN and 2 * cost >= pieces):
        return full(digests)
    return Manifest(
        base=base_digest,
        chain_length=base.chain_length + 1,
        chain_cost=cost,
        keep_head=head,
        keep_tail=tail,
        listed=listed,
    )


def shared(one: bytes, other: bytes) -> tuple[int, int]:
    """How many digests two lists have in common at the front, and at the end of what is left."""
    shorter = min(len(one), len(other)) // DIGEST_BYTES
    head = _common(shorter, lambda count: one[: count * DIGEST_BYTES] == other[: count * DIGEST_BYTES])
    tail = _common(
        shorter - head,
        lambda count: one[len(one) - count * DIGEST_BYTES :] == other[len(other) - count * DIGEST_BYTES :],
    )
    return head, tail


def _common(most: int, equal: Callable[[int], bool]) -> int:
    """The largest count up to `most` of which `equal` is true; it is true of every smaller one."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if equal(middle):
            low = middle
        else:
            high = middle - 1
    return low
