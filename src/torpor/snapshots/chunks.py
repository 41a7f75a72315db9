"""A file's bytes on their way into objects, back, and beside each other: small files whole, big ones in chunks.

Owns where a file is cut (docs/snapshot-format.md). Bytes that moved within a file are cut at the same places
again, so they are stored once. Memory is bounded, whatever the file's size; holes cost nothing.
"""

import os
from collections.abc import Callable, Iterator

from pyfastcdc import FastCDC

from torpor.snapshots.beneath import all_zeros, data_extents, is_zeros, write_sparsely
from torpor.snapshots.objects import (
    CHUNK_BYTES_MAX,
    Content,
    Objects,
    chunks_of,
    read_chunk,
    store_content,
)

CELL_BYTES = 65_536
_CHUNK_BYTES_MIN = 16_384
_CHUNK_BYTES_WANTED = 65_536
_NORMALIZATION = 2
_READ_BYTES = 4 * 1024 * 1024


def store_file(descriptor: int, size: int, put: Callable[[bytes], bytes]) -> Content:
    """Store the bytes of an open file that nobody else changes."""
    return store_content(_pieces(descriptor, size), size, put)


def store_bytes(data: bytes, put: Callable[[bytes], bytes]) -> Content:
    """Store the bytes of a file of at most CHUNK_BYTES_MAX bytes."""
    return store_content([] if all_zeros(data) else [(0, data)], len(data), put)


def write_content(descriptor: int, encoded: bytes, size: int, objects: Objects) -> None:
    """Write a content into a new, empty file.

    Raises:
        Damaged: snapshot_damaged.
    """
    chunks = list(chunks_of(encoded, size, objects))
    if len(chunks) > 1:
        objects.ahead(chunk.digest for chunk in chunks)
    for chunk in chunks:
        write_sparsely(descriptor, read_chunk(chunk, objects), chunk.offset)
    os.ftruncate(descriptor, size)


def holds_content(descriptor: int, encoded: bytes, size: int, objects: Objects) -> bool:
    """Whether an open file of `size` bytes holds this content; it may change meanwhile."""
    at = 0
    for chunk in chunks_of(encoded, size, objects):
        if not is_zeros(descriptor, at, chunk.offset):
            return False
        if objects.digest_of(os.pread(descriptor, chunk.length, chunk.offset)) != chunk.digest:
            return False
        at = chunk.offset + chunk.length
    return is_zeros(descriptor, at, size)


def _pieces(descriptor: int, size: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of each object that the file becomes."""
    if size <= CHUNK_BYTES_MAX:
        data = os.pread(descriptor, size, 0)
        if not all_zeros(data):
            yield 0, data
        return
    # The chunker may not be shared by threads.
    chunker = FastCDC(
        _CHUNK_BYTES_WANTED,
        min_size=_CHUNK_BYTES_MIN,
        max_size=CHUNK_BYTES_MAX,
        normalized_chunking=_NORMALIZATION,
    )
    start, uncut = 0, b""
    for offset, data in _runs(descriptor, size):
        if offset != start + len(uncut):
            yield from _cut(chunker, start, uncut, 0)
            start, uncut = offset, b""
        uncut += data
        # Where a chunk ends is certain only with as many bytes at hand as it may have.
        for at, chunk in _cut(chunker, start, uncut, CHUNK_BYTES_MAX):
            yield at, chunk
            start = at + len(chunk)
        uncut = uncut[len(uncut) - (offset + len(data) - start) :]
    yield from _cut(chunker, start, uncut, 0)


def _cut(chunker: FastCDC, offset: int, data: bytes, left_bytes_min: int) -> Iterator[tuple[int, bytes]]:
    """Chunks from the front of `data` for as long as so many bytes are left."""
    if not data:
        return
    for chunk in chunker.cut_buf(data):
        if len(data) - chunk.offset < left_bytes_min:
            return
        yield offset + chunk.offset, bytes(chunk.data)


def _runs(descriptor: int, size: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the cells that are not zeros alone, neighbours joined, in order."""
    at = 0
    for start, end in data_extents(descriptor, size):
        at = max(at, start - start % CELL_BYTES)
        cells_end = min(size, end + -end % CELL_BYTES)
        while at < cells_end:
            data = os.pread(descriptor, min(_READ_BYTES, cells_end - at), at)
            if not data:
                return
            yield from _without_zero_cells(at, data)
            at += len(data)


def _without_zero_cells(offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    start = 0
    for at in range(0, len(data), CELL_BYTES):
        cell = data[at : at + CELL_BYTES]
        if all_zeros(cell):
            if start < at:
                yield offset + start, data[start:at]
            start = at + len(cell)
    if start < len(data):
        yield offset + start, data[start:] if start else data
