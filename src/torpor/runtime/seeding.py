"""A session's checkpoint 0: the user's directory, as it is, as the workspace before the agent starts."""

import shutil
from pathlib import Path

from torpor.core.checkpoint import Checkpoint
from torpor.core.clock import Clock
from torpor.core.ids import new_snapshot_id
from torpor.db.sessions import Session
from torpor.runtime import workspaces
from torpor.runtime.home import Home
from torpor.runtime.session_store import SessionStore
from torpor.snapshots.capture import capture
from torpor.snapshots.lease import Lease


def seed(
    home: Home,
    session: Session,
    source: Path,
    environments: tuple[bytes, ...],
    store: SessionStore,
    lease: Lease,
    clock: Clock,
) -> Checkpoint:
    """Store it; the caller commits. Nothing in it is changed.

    Args:
        environments: paths in it, relative, that are shown where they lie instead of being copied.
    """
    from torpor.runtime.checkpointing import files_checkpoint

    snapshot_id = new_snapshot_id(clock.wall_ns())
    scratch = home.session(session.session_id) / "seed"
    for name in ("image", "changes"):
        (scratch / name).mkdir(parents=True, mode=0o700)
    workspace = capture(
        source,
        scratch / "changes",
        leave_out=lambda path: workspaces.left_out(path, environments),
        clock=clock,
    )
    saved = store.save(
        image_dir=scratch / "image",
        workspace=workspace,
        parent=None,
        pins={},
        snapshot_id=snapshot_id,
        lease=lease,
    )
    shutil.rmtree(scratch)
    return files_checkpoint(
        saved,
        session_id=session.session_id,
        number=0,
        seq=session.head_seq,
        cursor_seq=session.cursor_seq,
        incarnation=0,
        reason="start",
        wall_ns=clock.wall_ns(),
    )
