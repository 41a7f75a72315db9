"""Makes the session that an agent spawns: its row and key, and as its checkpoint 0 a part of the parent's workspace.

The child's id follows from the call's, so a call that is carried out again finds what the first attempt has left.
Order, and what a kill -9 leaves:

    the parent's checkpoint commits        a call that is carried out again, with that checkpoint
    child's row and key (`child.created`)  a session that is `created` and that nobody runs: found again by its id
    child's checkpoint 0 (`child.seeded`)  the same, with its workspace
    sent, waitpoint, the child is due, answer, completed: one transaction of the parent's (`gateway.own`)
                                           a child, which a node runs; the answer is delivered from the log
"""

import asyncio
import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from torpor.core.call import Call
from torpor.core.checkpoint import Checkpoint
from torpor.core.crash import crash_point
from torpor.core.errors import InvalidInput, NotFound
from torpor.core.ids import SessionId
from torpor.db import budgets, checkpoints, keys, sessions
from torpor.db.database import Transaction
from torpor.gateway.agent_api import SpawnBody
from torpor.runtime import seeding
from torpor.runtime.session_store import SessionStore
from torpor.runtime.spec import SessionSpec

if TYPE_CHECKING:
    from torpor.runtime.runtime import Runtime


def child_id_of(call: Call) -> SessionId:
    """Ids have 26 digits behind their prefix, which no other call has."""
    return SessionId(f"ses_{call.call_id.partition('_')[2]}")


async def make_child(
    runtime: "Runtime", spec: SessionSpec, store: SessionStore, point: Checkpoint, call: Call, body: SpawnBody
) -> SessionId:
    """A session that nobody has run yet.

    Args:
        spec, store: the parent's; `point` is its checkpoint.

    Raises:
        InvalidInput: `workspace_part_unknown`, or the name is malformed.
        Conflict: `session_name_taken`.
    """
    child_id = child_id_of(call)
    source = runtime.home.session(child_id) / "from-parent"
    await asyncio.to_thread(shutil.rmtree, source.parent / "seed", ignore_errors=True)
    await asyncio.to_thread(shutil.rmtree, source, ignore_errors=True)
    source.mkdir(parents=True, mode=0o700)
    try:
        async with store.lease():
            await asyncio.to_thread(store.restore_workspace, point, source)
        part = _part(source, body.workspace)
        session, own_store = await _row(runtime, spec, child_id, call, body)
        crash_point("child.created")
        seeded = await runtime.database.read(lambda tx: checkpoints.newest(tx, child_id))
        if seeded is None:
            await _seed(runtime, session, part, own_store)
            crash_point("child.seeded")
    finally:
        await asyncio.to_thread(shutil.rmtree, source, ignore_errors=True)
    return child_id


def _part(source: Path, wanted: str) -> Path:
    """A directory of the workspace. It is the agent's, so a link may lead anywhere: only real directories count."""
    part = source
    for name in Path(wanted).parts:
        part /= name
        if name == ".." or part.is_symlink() or not part.is_dir() or not part.is_relative_to(source):
            raise InvalidInput(
                "workspace_part_unknown",
                f"cannot begin a session with {wanted[:200]!r}: the workspace has no such directory",
                hint="Give a directory relative to /workspace, without links.",
            )
    return part


async def _row(
    runtime: "Runtime", spec: SessionSpec, child_id: SessionId, call: Call, body: SpawnBody
) -> tuple[sessions.Session, SessionStore]:
    with contextlib.suppress(NotFound):
        found = await runtime.database.read(lambda tx: sessions.get(tx, child_id))
        return found, await runtime.stores.of(found)
    own = msgspec.structs.replace(
        spec,
        argv=tuple(body.command),
        environment={**spec.environment, **body.environment},
        workspace_source=f"session {call.session_id}",
    )
    key, kept = (await runtime.stores.keyring(anew=True)).new_session_key(child_id)

    def record(tx: Transaction) -> sessions.Session:
        created = sessions.create(
            tx,
            session_id=child_id,
            name=body.name,
            spec=msgspec.to_builtins(own),
            wall_ns=runtime.clock.wall_ns(),
            # Its own number is never looked at (`budgets.account`), but says that one has to be asked.
            budget_nanousd=budgets.account(tx, call.session_id).limit,
        )
        keys.add_session(tx, session_id=child_id, owner_token=created.owner_token, key=kept)
        return created

    session = await runtime.database.write(record, durable=True)
    return session, await runtime.stores.with_key(child_id, own, key)


async def _seed(runtime: "Runtime", session: sessions.Session, source: Path, store: SessionStore) -> None:
    async with store.lease() as lease:
        point = await asyncio.to_thread(seeding.seed, runtime.home, session, source, (), store, lease, runtime.clock)
        await runtime.database.write(
            lambda tx: checkpoints.commit(
                tx,
                session_id=session.session_id,
                owner_token=session.owner_token,
                checkpoint=point,
                wall_ns=runtime.clock.wall_ns(),
            ),
            durable=True,
        )
