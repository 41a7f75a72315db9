"""Memory-backed directories of one session: where images are written to, and where the newest ones wait for a restore.

Everything here is a copy: a crash, a reboot or another process's clean-up costs time, never data. An image is trusted
only when its `complete` mark is there, which is made after the driver has written it. What has been written counts
against the directory's free space and the machine's free memory, so an image is begun only when it fits beside all
others. Freeing an image takes the kernel some milliseconds: callers on an event loop leave that to a thread.
"""

import contextlib
import os
import shutil
import stat
import sys
from collections.abc import Collection, Generator
from pathlib import Path

from torpor.core.errors import MachineUnfit
from torpor.core.ids import SessionId, SnapshotId
from torpor.runtime import image_cache
from torpor.runtime.image_cache import MEMORY_DIRECTORY, staging_directory

SPARE_BYTES = 32 << 20


class Staging:
    """The staging directory of one session of one TORPOR_HOME."""

    def __init__(self, home: Path, session_id: SessionId, memory_directory: Path = MEMORY_DIRECTORY) -> None:
        self._home = home
        self._memory = memory_directory
        self._held: int | None = None
        self.root = staging_directory(home, memory_directory) / session_id

    def hold(self) -> None:
        """Keep every image of this session until `let_go`, or until this process ends; others may free it from then on.

        Raises:
            MachineUnfit: `staging_not_ours`.
        """
        while self._held is None:
            self._make_root()
            self._held = image_cache.hold(self.root)

    def let_go(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None
        with contextlib.suppress(OSError):  # There are images in it, or it is gone.
            self.root.rmdir()
        image_cache.remove_if_empty(self.root.parent)

    @contextlib.contextmanager
    def room(self, snapshot_id: SnapshotId, raw_bytes: int) -> Generator[Path]:
        """Where an image is laid that is on its way from one store to another; nothing of this session stays.

        Held meanwhile: a node that looks after images would take it for one that a dead node left.

        Raises:
            As `begin`.
        """
        try:
            self.hold()
            self.begin(snapshot_id, raw_bytes)
            yield self.image(snapshot_id)
        finally:
            self.clear()
            self.let_go()

    def image(self, snapshot_id: SnapshotId) -> Path:
        return self.root / snapshot_id / "image"

    def changes(self, snapshot_id: SnapshotId) -> Path:
        """Where the workspace's changed files are copied to while the sandbox is paused."""
        return self.root / snapshot_id / "workspace"

    def has_room(self, expected_bytes: int) -> bool:
        """Whether an image of that size fits."""
        free = shutil.disk_usage(self._memory).free if self._memory.is_dir() else 0
        return min(free, available_memory()) >= expected_bytes + SPARE_BYTES

    def make_room(self, expected_bytes: int) -> bool:
        """As `has_room`; the images of sleeping sessions go for it."""
        if not self.has_room(expected_bytes):
            image_cache.trim(self.root.parent, image_cache.NOTHING, 0)
        return self.has_room(expected_bytes)

    def begin(self, snapshot_id: SnapshotId, expected_bytes: int) -> None:
        """Make room for a new image, and the directories that it is written to.

        Raises:
            MachineUnfit: `no_staging_space`: there is too little left for an image of that size.
        """
        if not self.make_room(expected_bytes):
            needed = (expected_bytes + SPARE_BYTES) >> 20
            raise MachineUnfit(
                "no_staging_space",
                f"cannot stage an image: {self._memory}, or this machine's memory, has less than {needed} MiB free",
                hint=f"End other sessions or enlarge it (`mount -o remount,size=… {self._memory}`).",
            )
        self._make_root()
        for directory in (self.image(snapshot_id), self.changes(snapshot_id)):
            directory.mkdir(parents=True, mode=0o700)

    def complete(self, snapshot_id: SnapshotId) -> None:
        """The image is whole."""
        (self.root / snapshot_id / image_cache.COMPLETE).touch()

    def cached(self, snapshot_id: SnapshotId, raw_bytes: int) -> Path | None:
        """The image of a snapshot, if it is still in memory, whole and of that size."""
        image = self.image(snapshot_id)
        if not (self.root / snapshot_id / image_cache.COMPLETE).exists() or self.root.stat().st_uid != os.geteuid():
            return None
        return image if sum(file.stat().st_size for file in image.iterdir()) == raw_bytes else None

    def images(self) -> dict[SnapshotId, int]:
        """The whole images that are in memory now, with their bytes; others may free some meanwhile."""
        found: dict[SnapshotId, int] = {}
        for mark in self.root.glob(f"*/{image_cache.COMPLETE}"):
            with contextlib.suppress(FileNotFoundError):
                files = (mark.parent / "image").iterdir()
                found[SnapshotId(mark.parent.name)] = sum(file.stat().st_size for file in files)
        return found

    def rename(self, old: SnapshotId, new: SnapshotId) -> None:
        """The same image is a snapshot of another id now."""
        with contextlib.suppress(OSError):  # Mostly there is none. Without it a restore reads the store.
            (self.root / old).rename(self.root / new)

    def discard(self, snapshot_id: SnapshotId) -> None:
        shutil.rmtree(self.root / snapshot_id, ignore_errors=True)

    def discard_changes(self, snapshot_id: SnapshotId) -> None:
        shutil.rmtree(self.changes(snapshot_id), ignore_errors=True)

    def keep_only(self, snapshot_ids: Collection[SnapshotId]) -> None:
        """Free everything else of this session."""
        if self.root.is_dir():
            for entry in self.root.iterdir():
                if entry.name not in snapshot_ids:
                    shutil.rmtree(entry, ignore_errors=True)

    def clear(self) -> None:
        """Free everything of this session, and the directory of its TORPOR_HOME if it was the last one there."""
        shutil.rmtree(self.root, ignore_errors=True)
        image_cache.remove_if_empty(self.root.parent)

    def _make_root(self) -> None:
        """Make this session's directory. Another session's `clear` may remove the empty one above it meanwhile."""
        while not self.root.is_dir():
            with contextlib.suppress(FileNotFoundError):
                self._make_private(self.root.parent)
                self._make_private(self.root)
                image_cache.mark(self.root.parent, self._home)

    def _make_private(self, directory: Path) -> None:
        """Others may write to the memory directory: a directory of ours that is not ours is refused."""
        with contextlib.suppress(FileExistsError):  # exist_ok=True would raise it for one that is removed meanwhile
            directory.mkdir(mode=0o700)
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise MachineUnfit(
                "staging_not_ours", f"cannot stage an image: {directory} belongs to somebody else", hint="Remove it."
            )


def available_memory() -> int:
    """Bytes that this machine could give to programs without swapping; without a kernel that says so, no limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return sys.maxsize
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), sys.maxsize)
