"""`torpor snapshot import`: a session from another machine, with one checkpoint from which it is resumed here.

What cannot be restored here is refused before anything is written. Nothing that the file says is believed before its
end was read, and nothing of it gets into the store but what was restored from it, which verifies it. Order and crash
points are in docs/snapshot-file.md.
"""

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import msgspec

from torpor.core.checkpoint import Checkpoint
from torpor.core.crash import crash_point
from torpor.core.errors import InvalidInput, MachineUnfit
from torpor.core.ids import SessionId, new_snapshot_id
from torpor.core.pins import IMAGE, PinsUnmet, check_pins
from torpor.db import checkpoints, keys, roots
from torpor.db.database import Transaction
from torpor.db.encoding import encode_json
from torpor.runtime import leasing, transfer
from torpor.runtime.home import install_sdk, put
from torpor.runtime.portable import Description, read_description, scratch_directory, unreadable
from torpor.runtime.runtime import Runtime
from torpor.runtime.session_store import SessionStore
from torpor.runtime.spec import SessionSpec, image_spec, root_image
from torpor.runtime.staging import Staging
from torpor.sandbox.drivers import GvisorDrivers
from torpor.sandbox.root_listing import first_difference, root_listing
from torpor.sandbox.rootfs import RootImage, image_here
from torpor.sandbox.tools import find_runsc
from torpor.snapshots.backend import LocalDirectory, is_key, storage_errors
from torpor.snapshots.capture import capture
from torpor.snapshots.cipher import key_of
from torpor.snapshots.collect import Progress
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.lease import Lease
from torpor.snapshots.manifest import SnapshotRef
from torpor.snapshots.snapshot_file import Record, read_records, split_object
from torpor.snapshots.store import SavedSnapshot, SnapshotStore

_OBJECTS = ("manifests/", "packs/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """Attributes:
    unmet: why the image can't be restored here, if it was brought all the same.
    """

    session_id: SessionId
    checkpoint: int
    unmet: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """What the session's image is here, and what its snapshot needs; and why that is not met."""

    image: RootImage
    pins: dict[str, str]
    unmet: str = ""


async def import_snapshot(
    runtime: Runtime,
    file: Path,
    passphrase: bytes | None,
    me: leasing.Holder,
    answers: leasing.HolderAnswers,
    progress: Progress,
    *,
    anyway: bool,
) -> Imported:
    """Bring the session here.

    Raises:
        InvalidInput: `snapshot_file_unreadable`, `passphrase_needed`, `passphrase_wrong`, `import_unreadable`.
        Conflict: `session_exists`; `session_running`, somebody else imports it.
        MachineUnfit: `pins_unmet`, this machine can't restore it; `no_space`.
        Damaged: an object in the file is not what was exported.
    """
    with _opened(file) as stream:
        records = read_records(stream, passphrase)
        description = await asyncio.to_thread(_first, records)
        session_id = description.session_id
        await runtime.database.read(lambda tx: transfer.check_new(tx, session_id))
        fit = await asyncio.to_thread(_fit, runtime, description, progress, anyway=anyway)
        lock = await leasing.acquire_lock(session_id, runtime.home.lock(session_id), me, answers=answers)
        try:
            with scratch_directory(runtime.home.session(session_id) / "import", session_id) as scratch:
                bringing = _Bringing(runtime, description, fit, scratch, progress)
                await asyncio.to_thread(bringing.unpack, records)
                await _bring(runtime, bringing)
        finally:
            lock.release()
    return Imported(session_id=session_id, checkpoint=bringing.point.number, unmet=fit.unmet)


async def _bring(runtime: Runtime, bringing: "_Bringing") -> None:
    session_id, spec = bringing.session_id, bringing.spec
    key, kept = (await runtime.stores.keyring(anew=True)).new_session_key(session_id)
    await asyncio.to_thread(runtime.backend.ready)
    store = await runtime.stores.with_key(session_id, spec, key)
    async with store.lease() as lease:
        saved = await asyncio.to_thread(bringing.save, store, lease)
        crash_point("import.stored")
        point = replace(bringing.point, snapshot_id=saved.id, manifest_digest=saved.manifest_digest)

        def also(tx: Transaction) -> None:
            keys.add_session(tx, session_id=session_id, owner_token=0, key=kept)
            wall_ns = runtime.clock.wall_ns()
            roots.bring(tx, session_id=session_id, owner_token=0, checkpoint=point, wall_ns=wall_ns)

        with bringing.lines() as lines:
            incoming = await asyncio.to_thread(transfer.Incoming, lines)
            await transfer.bring_in(incoming, runtime.database, runtime.home, also)
    crash_point("import.committed")


def _fit(runtime: Runtime, description: Description, progress: Progress, *, anyway: bool) -> _Fit:
    """Compare what the image needs with this machine, the cheap things first."""
    there = root_image(description.spec.image)
    image = there
    try:
        image = image_here(there, runtime.home.images)
        if not description.pins:
            return _Fit(image=image, pins={})
        tools, clock = runtime.home.tools, runtime.clock
        runsc = find_runsc(tools, os.environ, clock)
        drivers = GvisorDrivers(
            runsc=runsc, tools_directory=tools, state_directory=runtime.home.driver_state, clock=clock
        )
        what = f"checkpoint {description.checkpoint.get('number')} of session {description.session}"
        check_pins(what, description.pins, drivers.for_image(description.pins).pins)
        path = first_difference(description.listing, root_listing(image, progress))
        if path is not None:
            reason = f"its root image differs at {path}: names, sizes or times of files are not the same"
            raise PinsUnmet("pins_unmet", f"cannot restore {what} on this machine: {reason}")
        return _Fit(image=image, pins={**description.pins, IMAGE: image.digest})
    except (MachineUnfit, InvalidInput) as error:
        if anyway:
            return _Fit(image=image, pins=description.pins, unmet=str(error))
        hint = "Import it on such a machine; or say --anyway, to read its log and pull its files here."
        raise PinsUnmet("pins_unmet", str(error), hint=hint) from error


class _Bringing:
    """The part that blocks: the file is unpacked into `scratch`, and what it holds is saved anew."""

    def __init__(
        self, runtime: Runtime, description: Description, fit: _Fit, scratch: Path, progress: Progress
    ) -> None:
        self.session_id = description.session_id
        self.point = _point(description)
        self._tools = runtime.home.tools
        self.spec = replace_spec(description, fit.image, self._init_directory(description))
        self._clock = runtime.clock
        self._description = description
        self._pins = fit.pins
        self._scratch = scratch
        self._progress = progress
        self._backend = LocalDirectory(scratch / "store")
        self._staging = Staging(runtime.home.root, SessionId(f"{self.session_id}.import"))

    def unpack(self, records: Iterator[tuple[Record, bytes]]) -> None:
        """Everything behind the description, which is to be believed when this returns.

        Raises:
            InvalidInput: `snapshot_file_unreadable`.
        """
        program, count = b"", 0
        with storage_errors(f"unpack into {self._scratch}"), (self._scratch / "lines").open("wb") as lines:
            for kind, content in records:
                match kind:
                    case Record.PROGRAM:
                        program = content
                    case Record.OBJECT:
                        key, data = split_object(content)
                        if not is_key(key) or not key.startswith(_OBJECTS):
                            raise unreadable(f"{key!r} is no object of a snapshot")
                        self._backend.put(key, data)
                        count += 1
                        self._progress("unpacking objects", count, count)
                    case Record.LINES:
                        lines.write(content)
                    case _:
                        raise unreadable("it describes itself twice")
        if hashlib.sha256(program).hexdigest() != self._description.init:
            raise unreadable("its torpor-init is another one than it says")
        self._install(program)

    def save(self, store: SessionStore, lease: Lease) -> SavedSnapshot:
        """Restore what was unpacked, and save it in the store of this machine."""
        found = self._description
        ref = SnapshotRef(id=found.snapshot_id, manifest_digest=found.manifest_digest, key=key_of(found.key))
        source = SnapshotStore(self._backend, ContentIds(found.ids), clock=self._clock)
        workspace, changes = self._scratch / "workspace", self._scratch / "changes"
        for directory in (workspace, changes):
            directory.mkdir(mode=0o700)
        self._progress("storing", 0, 2)
        with self._staging.room(ref.id, found.raw_bytes) as image:
            source.restore_image(ref, image)
            source.restore_workspace(ref, workspace)
            self._progress("storing", 1, 2)
            saved = store.save(
                image_dir=image,
                workspace=capture(workspace, changes, clock=self._clock),
                parent=None,
                pins=self._pins,
                snapshot_id=new_snapshot_id(self._clock.wall_ns()),
                lease=lease,
            )
            self._progress("storing", 2, 2)
            return saved

    @contextlib.contextmanager
    def lines(self) -> Generator[Iterator[str]]:
        """The exported lines, of which the first says what the session is to run: here."""
        with (self._scratch / "lines").open(encoding="utf-8") as lines:
            yield self._with_spec(lines)

    def _with_spec(self, lines: Iterator[str]) -> Iterator[str]:
        first = next(lines, "")
        try:
            envelope = json.loads(first)
            if envelope["session_id"] != self.session_id:
                raise unreadable("its log is of another session")
            yield json.dumps({**envelope, "spec": encode_json(msgspec.to_builtins(self.spec))})
        except (ValueError, TypeError, KeyError) as error:
            raise unreadable("its log does not begin with a session") from error
        yield from lines

    def _init_directory(self, description: Description) -> Path:
        return self._tools / f"init-{description.init[:16]}"

    def _install(self, program: bytes) -> None:
        """Beside the torpor-init of this version: an image maps the very file."""
        directory = self._init_directory(self._description)
        install_sdk(directory)
        target = directory / "torpor-init"
        if target.exists() and target.read_bytes() == program:
            return
        directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        put(target, program, mode=0o755)


def replace_spec(description: Description, image: RootImage, init_directory: Path) -> SessionSpec:
    return msgspec.structs.replace(
        description.spec, image=image_spec(image), init_directory=str(init_directory), workspace_source=""
    )


def _first(records: Iterator[tuple[Record, bytes]]) -> Description:
    kind, content = next(records, (Record.END, b""))
    if kind != Record.HEAD:
        raise unreadable("it does not begin with what it holds")
    return read_description(content)


def _point(description: Description) -> Checkpoint:
    try:
        point = checkpoints.of_json(description.checkpoint)
    except (KeyError, TypeError) as error:
        raise unreadable(f"its checkpoint lacks {error}") from error
    if point.session_id != description.session_id:
        raise unreadable("its checkpoint is of another session")
    return point


@contextlib.contextmanager
def _opened(file: Path) -> Generator[BinaryIO]:
    try:
        stream = file.open("rb")
    except OSError as error:
        raise InvalidInput("snapshot_file_unreadable", f"cannot import {file}: {error.strerror}") from error
    with stream:
        yield stream
