"""What the first record of a snapshot file says (docs/snapshot-file.md), and where its store is while it is made."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec

from torpor.core.errors import Conflict, InvalidInput
from torpor.core.ids import SessionId, SnapshotId, parse_session_id
from torpor.runtime.spec import SessionSpec
from torpor.snapshots.backend import is_key, storage_errors
from torpor.snapshots.manifest import manifest_key

FORMAT = "torpor-snapshot-1"


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint of one session, and what it takes to restore it.

    Attributes:
        checkpoint: its row.
        snapshot, manifest_digest: in the file's own store.
        key, ids: what opens the manifest, and what names contents there.
        pins: what the image needs of a machine; empty for a checkpoint of files alone.
        listing: what the root image showed, path by path (sandbox/root_listing.py); empty with the pins.
        init: SHA-256 (hex) of the session's torpor-init.
    """

    format: str
    session: str
    spec: SessionSpec
    checkpoint: dict[str, Any]
    snapshot: str
    manifest_digest: str
    key: bytes
    ids: bytes
    pins: dict[str, str]
    listing: dict[str, str]
    init: str
    raw_bytes: int

    @property
    def session_id(self) -> SessionId:
        return parse_session_id(self.session)

    @property
    def snapshot_id(self) -> SnapshotId:
        return SnapshotId(self.snapshot)


def read_description(content: bytes) -> Description:
    """Raises InvalidInput: `snapshot_file_unreadable`."""
    try:
        found = msgspec.json.decode(content, type=Description)
        is_known = found.format == FORMAT and is_key(manifest_key(found.snapshot_id)) and bool(found.session_id)
    except (msgspec.MsgspecError, InvalidInput) as error:
        raise unreadable(f"it does not say what it holds: {error}") from error
    if not is_known:
        raise unreadable("it does not say what it holds")
    return found


def unreadable(reason: str) -> InvalidInput:
    return InvalidInput("snapshot_file_unreadable", f"cannot import the snapshot: {reason}")


@contextlib.contextmanager
def scratch_directory(directory: Path, session_id: SessionId) -> Generator[Path]:
    """An empty directory, gone afterwards; what a killed process left of it goes first.

    Raises:
        Conflict: `export_running`, another process is at work in it.
    """
    with storage_errors(f"make {directory}"):
        directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(directory.with_name(directory.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o700)
        yield directory
    except BlockingIOError as error:
        raise Conflict("export_running", f"cannot export session {session_id}: somebody else just does that") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)
