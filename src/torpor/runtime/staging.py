"""Memory-backed directories of one session: where images are written to, and where the newest ones wait for a restore.

Everything here is a copy: a crash, a reboot or another process's clean-up costs time, never data. An image is trusted
only when its `complete` mark is there, which is made after the driver has written it.
"""

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Collection
from pathlib import Path

from torpor.core.errors import MachineUnfit
from torpor.core.ids import SessionId, SnapshotId

MEMORY_DIRECTORY = Path("/dev/shm")  # noqa: S108 - private subdirectories, mode 0700, checked to be ours
SPARE_BYTES = 32 << 20


class Staging:
    """The staging directory of one session of one TORPOR_HOME."""

    def __init__(self, home: Path, session_id: SessionId, memory_directory: Path = MEMORY_DIRECTORY) -> None:
        name = hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:12]
        self._memory = memory_directory
        self.root = memory_directory / f"torpor-{os.geteuid()}-{name}" / session_id

    def image(self, snapshot_id: SnapshotId) -> Path:
        return self.root / snapshot_id / "image"

    def changes(self, snapshot_id: SnapshotId) -> Path:
        """Where the workspace's changed files are copied to while the sandbox is paused."""
        return self.root / snapshot_id / "workspace"

    def begin(self, snapshot_id: SnapshotId, expected_bytes: int) -> None:
        """Make room for a new image.

        Raises:
            MachineUnfit: `no_staging_space`: the memory directory has too little left for an image of that size.
        """
        free = shutil.disk_usage(self._memory).free if self._memory.is_dir() else 0
        needed = expected_bytes + SPARE_BYTES
        if free < needed:
            raise MachineUnfit(
                "no_staging_space",
                f"cannot stage an image: {self._memory} has {free >> 20} MiB free, {needed >> 20} MiB are needed",
                hint=f"End other sessions or enlarge it (`mount -o remount,size=… {self._memory}`).",
            )
        self._make_root()
        for directory in (self.image(snapshot_id), self.changes(snapshot_id)):
            directory.mkdir(parents=True, mode=0o700)

    def complete(self, snapshot_id: SnapshotId) -> None:
        """The image is whole."""
        (self.root / snapshot_id / "complete").touch()

    def cached(self, snapshot_id: SnapshotId) -> Path | None:
        """The image of a snapshot, if it is still in memory and whole."""
        whole = (self.root / snapshot_id / "complete").exists() and self.root.stat().st_uid == os.geteuid()
        return self.image(snapshot_id) if whole else None

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
        with contextlib.suppress(OSError):
            self.root.parent.rmdir()

    def _make_root(self) -> None:
        """Make this session's directory. Another session's `clear` may remove the empty one above it meanwhile."""
        while not self.root.is_dir():
            with contextlib.suppress(FileNotFoundError):
                self._make_private(self.root.parent)
                self._make_private(self.root)

    def _make_private(self, directory: Path) -> None:
        """Others may write to the memory directory: a directory of ours that is not ours is refused."""
        with contextlib.suppress(FileExistsError):  # exist_ok=True would raise it for one that is removed meanwhile
            directory.mkdir(mode=0o700)
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise MachineUnfit(
                "staging_not_ours", f"cannot stage an image: {directory} belongs to somebody else", hint="Remove it."
            )
