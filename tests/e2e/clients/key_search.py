"""Looks for a secret in all that lies below a directory, as it is and within every zstd frame, and in all snapshots."""

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import zstandard

from torpor.core.clock import SystemClock
from torpor.db import checkpoints, sessions
from torpor.runtime.runtime import open_runtime

FRAME_MAGIC = b"\x28\xb5\x2f\xfd"
FRAME_BYTES_MAX = 1 << 20


def files_with(secret: str, directory: Path) -> list[str]:
    """The files that hold the secret, by their paths below the directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    needle = secret.encode()
    return [str(path.relative_to(directory)) for path in files if any(needle in text for text in _texts(path))]


def snapshots_with(secret: str, home: Path) -> list[str]:
    """The files of all snapshots, images and workspaces, that hold the secret; opened with the keys of that home."""
    opened = Path(tempfile.mkdtemp(prefix="torpor-test-", dir="/dev/shm"))
    try:
        asyncio.run(_restore_all(home, opened))
        assert any(opened.iterdir()), "there are no snapshots"
        return files_with(secret, opened)
    finally:
        shutil.rmtree(opened)


async def _restore_all(home: Path, destination: Path) -> None:
    async with open_runtime({**os.environ, "TORPOR_HOME": str(home)}, SystemClock()) as runtime:
        for session in await runtime.database.read(sessions.list_newest):
            store = await runtime.stores.of(session)
            points = await runtime.database.read(lambda tx, of=session.session_id: checkpoints.list_intact(tx, of))
            for point in points:
                target = destination / session.session_id / str(point.number)
                store.restore_image(point, target / "image")
                (target / "workspace").mkdir()
                store.restore_workspace(point, target / "workspace")


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
