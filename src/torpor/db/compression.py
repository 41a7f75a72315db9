"""How stored bytes are compressed: zstd where that saves a sixteenth, else as they are. One context a thread."""

import threading

import zstandard

CONTENT_BYTES_MAX = 1 << 30
REDACTED = "redacted-"
"""Begins the codec of content that was masked."""
_COMPRESS_FROM_BYTES = 128
_ZSTD_LEVEL = 3

_contexts = threading.local()


def encode(data: bytes) -> tuple[str, bytes]:
    """The codec's name and the bytes to store."""
    if len(data) >= _COMPRESS_FROM_BYTES:
        packed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=True).compress(data)
        if len(packed) < len(data) - len(data) // 16:
            return "zstd", packed
    return "raw", data


def decode(codec: str, stored: bytes) -> bytes:
    """What `encode` was given.

    Raises:
        ValueError: these are not bytes that it gave.
    """
    match codec:
        case "raw":
            return stored
        case "zstd":
            try:
                if zstandard.frame_content_size(stored) > CONTENT_BYTES_MAX:
                    raise ValueError("its size is beyond all bounds")
                return _decompressor().decompress(stored, max_output_size=CONTENT_BYTES_MAX)
            except zstandard.ZstdError as error:
                raise ValueError(str(error)) from error
        case _:
            raise ValueError(f"its codec {codec!r} is unknown")


def _decompressor() -> zstandard.ZstdDecompressor:
    """One for each thread: making one costs more than most blocks take."""
    made: zstandard.ZstdDecompressor | None = getattr(_contexts, "decompressor", None)
    if made is None:
        made = _contexts.decompressor = zstandard.ZstdDecompressor()
    return made
