"""`torpor fork`: new sessions from a checkpoint of another one. Order and crash points are in docs/forking.md.

The parent's rows are only read; a store lease keeps what they name until the children's rows name it too.
"""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from torpor.core.call import Call
from torpor.core.crash import crash_point
from torpor.core.errors import InvalidInput
from torpor.core.ids import CallId, SessionId, new_call_id, new_session_id, new_snapshot_id
from torpor.core.origin import Origin, plan
from torpor.core.session import SessionStatus
from torpor.db import calls, forks, requests, rewinds, sessions
from torpor.db.ahead import Ahead
from torpor.db.blobs import BLOB_BYTES_MIN
from torpor.db.database import Transaction
from torpor.db.forks import Child, Copied, Past
from torpor.db.sleeping import NOW
from torpor.runtime import leasing
from torpor.runtime.origins import find_origin, number_of_turn
from torpor.runtime.runtime import Runtime
from torpor.runtime.session_store import SessionStore
from torpor.runtime.spec import SessionSpec
from torpor.snapshots.cipher import Key
from torpor.snapshots.collect import Progress
from torpor.snapshots.lease import Lease

COUNT_MAX = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a person asks for with `torpor fork`.

    Attributes:
        at: see `find_origin`.
        resample: models are asked anew where the agent saw nothing of their answers.
        message: the first one in each child's inbox.
        asleep: only a person wakes the children, although a node daemon runs the parent.
        name: of the only child; of several, each with a number behind it.
        other: by a parent's call, the request that is sent in the place of its own.
    """

    at: str | None = None
    count: int = 1
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    message: str | None = None
    resample: bool = False
    asleep: bool = False
    name: str | None = None
    other: "Mapping[CallId, OtherRequest]" = field(default_factory=dict[CallId, "OtherRequest"])


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherRequest:
    """A request to another model than the agent's own: its target, its body, and the model."""

    target: str
    body: bytes
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Forked:
    """Attributes:
    turn: how many turns of the parent the children have behind them.
    call_ids: of each child, its copies by the parent's call.
    """

    parent: SessionId
    checkpoint: int
    turn: int
    children: Sequence[SessionId]
    call_ids: Sequence[Mapping[CallId, CallId]]


def _tell_nobody(_what: str, _done: int, _total: int) -> None:
    return


async def fork(
    runtime: Runtime,
    parent: sessions.Session,
    wish: Wish,
    me: leasing.Holder,
    progress: Progress = _tell_nobody,
) -> Forked:
    """Make the children, all or none.

    Raises:
        InvalidInput: `fork_count`, and as `find_origin`.
        Conflict, NotFound: as `find_origin`; `session_name_taken`.
        Damaged: the checkpoint, or a call that was open at its cut, can't be read.
    """
    if not 1 <= wish.count <= COUNT_MAX:
        raise InvalidInput("fork_count", f"cannot fork {wish.count} times: a number from 1 to {COUNT_MAX} is needed")
    await runtime.stores.keyring(anew=True)
    store = await runtime.stores.of(parent)
    async with AsyncExitStack() as held:
        lease = await held.enter_async_context(store.lease())
        past, turn = await runtime.database.read(lambda tx: _read(tx, runtime, parent, wish))
        ids = [new_session_id(runtime.clock.wall_ns()) for _ in range(wish.count)]
        if any(len(one.source.body) >= BLOB_BYTES_MIN for one in past.calls):
            _lock(runtime, ids, me, held)
        children = [await _prepare(runtime, past, wish, child_id, number) for number, child_id in enumerate(ids, 1)]
        sealed = await asyncio.to_thread(_reseal, store, past, children, lease, progress)
        crash_point("fork.stored")

        def create(tx: Transaction) -> None:
            for child in sealed:
                forks.create(tx, past, child, wall_ns=runtime.clock.wall_ns())

        await asyncio.to_thread(lease.check)
        await runtime.database.write(create, durable=True)
    crash_point("fork.committed")
    return Forked(
        parent=parent.session_id,
        checkpoint=past.origin.checkpoint.number,
        turn=turn,
        children=[child.session_id for child in sealed],
        call_ids=[child.call_ids for child in sealed],
    )


def _read(tx: Transaction, runtime: Runtime, parent: sessions.Session, wish: Wish) -> tuple[Past, int]:
    session_id = parent.session_id
    is_run = leasing.is_held(runtime.home.lock(session_id))
    origin = find_origin(tx, session_id, wish.at, branches=True, pump_alive=lambda _: is_run)
    made: dict[CallId, Call] = {call.call_id: call for call in calls.load_calls(tx, session_id)}
    was = rewinds.past_of(tx, session_id, before_seq=origin.past_seq)
    origin = replace(origin, checkpoint=was.point(origin.checkpoint))
    planned = plan(origin, made, was.timeline, resample=wish.resample)
    if wish.other:
        # The other request is the child's own, whatever the parent's got as an answer.
        planned = replace(planned, kept=tuple(call_id for call_id in planned.kept if call_id not in wish.other))
        asked = [call_id for call_id in wish.other if call_id not in planned.anew]
        planned = replace(planned, anew=(*planned.anew, *asked))
    past = forks.read_past(tx, session_id, origin, planned)
    return replace(past, calls=[_told(one, wish) for one in past.calls]), _turn(tx, session_id, origin)


def _turn(tx: Transaction, session_id: SessionId, origin: Origin) -> int:
    return number_of_turn(tx, session_id, origin.past_seq) + (origin.turn is not None)


def _told(one: Copied, wish: Wish) -> Copied:
    call_id = one.source.call.call_id
    if call_id not in wish.other:
        return one
    other = wish.other[call_id]
    head = replace(one.source.head, target=other.target)
    told = {"model": other.model, "asked_for": one.source.call.model}
    return replace(one, source=replace(one.source, head=head, body=other.body), told=told)


async def _prepare(runtime: Runtime, past: Past, wish: Wish, session_id: SessionId, number: int) -> tuple[Child, Key]:
    """A child without its snapshot, and its key. Large requests are stored under its id, which no row has yet."""
    now = runtime.clock.wall_ns
    key, kept = (await runtime.stores.keyring()).new_session_key(session_id)
    ahead = Ahead(database=runtime.database, session_id=session_id, owner_token=0)
    bodies = {
        one.source.call.call_id: await ahead.request(await asyncio.to_thread(requests.prepare, one.source.body))
        for one in past.calls
    }
    name = wish.name if wish.name is None or wish.count == 1 else f"{wish.name}-{number}"
    child = Child(
        session_id=session_id,
        name=name,
        spec=_spec(past, session_id, wish, number),
        key=kept,
        snapshot_id=new_snapshot_id(now()),
        manifest_digest="",
        call_ids={call_id: new_call_id(now()) for call_id in bodies},
        bodies=bodies,
        message=wish.message,
        wake_ns=_wake_ns(past.parent, wish),
    )
    return child, key


def _wake_ns(parent: sessions.Session, wish: Wish) -> int | None:
    """Whoever runs the parent runs the children; those of one that sleeps now sleep until what it waits for comes."""
    if parent.wake_ns is None or wish.asleep:
        return None
    sleeps_on = parent.status is SessionStatus.ASLEEP and wish.at is None and wish.message is None
    return parent.wake_ns if sleeps_on else NOW


def _spec(past: Past, session_id: SessionId, wish: Wish, number: int) -> dict[str, Any]:
    """The parent's, with an environment of the child's own."""
    spec = msgspec.convert(past.parent.spec, SessionSpec)
    identity = {"TORPOR_FORK": str(number), "TORPOR_MACHINE_ID": machine_id(session_id)}
    changes = {**spec.changes, **identity, **wish.environment}
    changed = msgspec.structs.replace(spec, environment={**spec.environment, **changes}, changes=changes)
    return msgspec.to_builtins(changed)


def machine_id(session_id: SessionId) -> str:
    """32 hexadecimal digits that no other session has, for an agent's /etc/machine-id."""
    return hashlib.sha256(session_id.encode()).hexdigest()[:32]


def _lock(runtime: Runtime, ids: Sequence[SessionId], me: leasing.Holder, held: AsyncExitStack) -> None:
    """Let no collector take the children's blobs for garbage, which have no rows yet."""
    for child_id in ids:
        lock = leasing.acquire_free_lock(runtime.home.lock(child_id), me)
        assert lock is not None, "nobody knows the id yet"
        held.callback(lock.release)


def _reseal(
    store: SessionStore, past: Past, children: Sequence[tuple[Child, Key]], lease: Lease, progress: Progress
) -> list[Child]:
    others = [(child.snapshot_id, key) for child, key in children]

    def tell(done: int) -> None:
        progress("making children", done, len(others))

    refs = store.reseal(past.origin.checkpoint, others, lease=lease, each=tell)
    return [replace(child, manifest_digest=ref.manifest_digest) for (child, _), ref in zip(children, refs, strict=True)]
