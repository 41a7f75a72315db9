"""`torpor snapshot export`: one checkpoint with its image and its files, and the whole log, as one file.

Nothing of the store is copied, since its packs may hold what other sessions saved: what the checkpoint needs is
restored, which verifies it, and saved anew under keys of the file's own. Order and format are in docs/snapshot-file.md.
"""

import asyncio
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from torpor.core.checkpoint import Checkpoint
from torpor.core.errors import NotFound
from torpor.core.ids import SessionId, new_snapshot_id
from torpor.db import checkpoints, children
from torpor.db.sessions import Session
from torpor.runtime import transfer
from torpor.runtime.portable import FORMAT, Description, scratch_directory
from torpor.runtime.runtime import Runtime
from torpor.runtime.session_store import SessionStore
from torpor.runtime.spec import SessionSpec, root_image
from torpor.runtime.staging import Staging
from torpor.sandbox.root_listing import root_listing
from torpor.snapshots.backend import LocalDirectory
from torpor.snapshots.capture import capture
from torpor.snapshots.cipher import new_key
from torpor.snapshots.collect import Progress
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.snapshot_file import FileWriter, Record
from torpor.snapshots.store import SnapshotStore

_LINES_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """Attributes:
    children: the sessions that it began and that have not ended; the file has nothing of them.
    """

    session_id: SessionId
    checkpoint: int
    file_bytes: int
    sealed: bool
    children: tuple[SessionId, ...]


async def export_snapshot(
    runtime: Runtime, session: Session, number: int | None, file: Path, passphrase: bytes | None, progress: Progress
) -> Exported:
    """Write the file; None is the newest checkpoint that is believed to restore.

    Raises:
        NotFound: `checkpoint_not_found`.
        Conflict: `session_without_checkpoint`, `export_running`.
        Damaged: the checkpoint does not restore, or a body of the log is damaged.
        MachineUnfit: no space, in memory or on the disk.
    """
    store = await runtime.stores.of(session)
    directory = runtime.home.session(session.session_id) / "export"
    with scratch_directory(directory, session.session_id) as scratch:
        async with store.lease():
            point = await _point(runtime, session.session_id, number)
            making = _Making(runtime, session, store, scratch, progress)
            description = await asyncio.to_thread(making.store_anew, point)
        writer = await asyncio.to_thread(FileWriter, file, passphrase)
        try:
            await asyncio.to_thread(making.write_objects, writer, description)
            await runtime.database.read(lambda tx: _write_lines(writer, transfer.export_lines(tx, session.session_id)))
            await asyncio.to_thread(writer.finish)
        finally:
            await asyncio.to_thread(writer.abandon)
    begun = await runtime.database.read(lambda tx: children.list_of(tx, session.session_id))
    return Exported(
        session_id=session.session_id,
        checkpoint=point.number,
        file_bytes=file.stat().st_size,
        sealed=passphrase is not None,
        children=tuple(child.session.session_id for child in begun if not child.has_ended),
    )


async def _point(runtime: Runtime, session_id: SessionId, number: int | None) -> Checkpoint:
    if number is None:
        return await runtime.newest_checkpoint(session_id)
    found = await runtime.database.read(lambda tx: checkpoints.numbered(tx, session_id, number))
    if found is None:
        raise NotFound(
            "checkpoint_not_found",
            f"cannot export checkpoint {number} of session {session_id}: there is none",
            hint=f"`torpor checkpoints {session_id}` lists them.",
        )
    return found


class _Making:
    """The part that blocks."""

    def __init__(
        self, runtime: Runtime, session: Session, store: SessionStore, scratch: Path, progress: Progress
    ) -> None:
        self._clock = runtime.clock
        self._session = session
        self._spec = msgspec.convert(session.spec, SessionSpec)
        self._store = store
        self._scratch = scratch
        self._progress = progress
        self._staging = Staging(runtime.home.root, SessionId(f"{session.session_id}.export"))
        self._backend = LocalDirectory(scratch / "store")

    def store_anew(self, point: Checkpoint) -> Description:
        """Restore the checkpoint, and save it in the file's own store."""
        ids, key, snapshot_id = new_key(), new_key(), new_snapshot_id(self._clock.wall_ns())
        workspace, changes = self._scratch / "workspace", self._scratch / "changes"
        for directory in (workspace, changes):
            directory.mkdir(mode=0o700)
        pins = dict(self._store.pins(point))
        self._progress("restoring", 0, 2)
        with self._staging.room(point.snapshot_id, point.raw_bytes) as image:
            self._store.restore_image(point, image)
            self._store.restore_workspace(point, workspace)
            self._progress("restoring", 1, 2)
            with self._backend.leases.hold() as lease:
                saved = SnapshotStore(self._backend, ContentIds(ids.secret), clock=self._clock).save(
                    image_dir=image,
                    workspace=capture(workspace, changes, clock=self._clock),
                    parent=None,
                    pins=pins,
                    snapshot_id=snapshot_id,
                    key=key,
                    lease=lease,
                )
            self._progress("restoring", 2, 2)
        return Description(
            format=FORMAT,
            session=self._session.session_id,
            spec=self._spec,
            checkpoint=checkpoints.as_json(point),
            snapshot=saved.id,
            manifest_digest=saved.manifest_digest,
            key=key.secret,
            ids=ids.secret,
            pins=pins,
            listing=root_listing(root_image(self._spec.image), self._progress) if pins else {},
            init=hashlib.sha256(self._init()).hexdigest(),
            raw_bytes=saved.raw_bytes,
        )

    def write_objects(self, writer: FileWriter, description: Description) -> None:
        writer.add(Record.HEAD, msgspec.json.encode(description))
        writer.add(Record.PROGRAM, self._init())
        keys = self._backend.list("manifests/") + self._backend.list("packs/")
        for done, key in enumerate(keys, 1):
            writer.add_object(key, self._backend.get(key))
            self._progress("writing the file", done, len(keys))

    def _init(self) -> bytes:
        return (Path(self._spec.init_directory) / "torpor-init").read_bytes()


def _write_lines(writer: FileWriter, lines: Iterable[dict[str, object]]) -> None:
    pending = bytearray()
    for line in lines:
        pending += json.dumps(line).encode() + b"\n"
        if len(pending) >= _LINES_BYTES:
            writer.add(Record.LINES, bytes(pending))
            pending.clear()
    writer.add(Record.LINES, bytes(pending))
