"""Looks for a secret in all that lies below a directory: as it is, and within every zstd frame of a file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

FRAME_MAGIC = b"\x28\xb5\x2f\xfd"
FRAME_BYTES_MAX = 1 << 20


def files_with(secret: str, directory: Path) -> list[str]:
    """The files that hold the secret, by their paths below the directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    needle = secret.encode()
    return [str(path.relative_to(directory)) for path in files if any(needle in text for text in _texts(path))]


def _texts(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    yield data
    start = data.find(FRAME_MAGIC)
    while start >= 0:
        unpacker = zstandard.ZstdDecompressor().decompressobj()
        # Four bytes may look like the beginning of a frame and be none.
        with contextlib.suppress(zstandard.ZstdError):
            yield unpacker.decompress(memoryview(data)[start : start + FRAME_BYTES_MAX])
        start = data.find(FRAME_MAGIC, start + len(FRAME_MAGIC))
