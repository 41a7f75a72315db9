"""Puts an owner together: the gateway, the checkpointer and the rest of what drives one session.

Apart from the runtime, since all of it takes half a second to import and most commands only read.
"""

from typing import TYPE_CHECKING

import msgspec

from torpor.core.call import Call
from torpor.core.checkpoint import Checkpoint
from torpor.core.ids import CallId, SessionId
from torpor.db.sessions import Session
from torpor.gateway.agent_api import SpawnBody
from torpor.gateway.crossroads import Crossroads
from torpor.gateway.pumps import FirstByteAt
from torpor.gateway.server import Gateway
from torpor.runtime.beginning import Beginning
from torpor.runtime.checkpointing import Checkpointer
from torpor.runtime.children import make_child
from torpor.runtime.hibernation import Hibernation
from torpor.runtime.incarnation import Incarnations
from torpor.runtime.memory import Memory
from torpor.runtime.owner import Owner
from torpor.runtime.records import Records
from torpor.runtime.recovery import Ladder
from torpor.runtime.session_store import SessionStore
from torpor.runtime.spec import SessionSpec
from torpor.runtime.staging import Staging
from torpor.runtime.watcher import Watcher
from torpor.sandbox.gvisor import Runsc

if TYPE_CHECKING:
    from torpor.runtime.runtime import Runtime


def make_owner(
    runtime: "Runtime",
    records: Records,
    session: Session,
    store: SessionStore,
    runsc: Runsc,
    watcher: Watcher,
    *,
    attended: bool,
    let_go: bool,
    boot: bool,
) -> Owner:
    """The owner of a session that was acquired; the arguments are those of `Runtime.own`."""
    clock = runtime.clock
    spec = msgspec.convert(session.spec, SessionSpec)
    crossroads = Crossroads(spec.on_divergence, let_go=let_go)
    staging = Staging(runtime.home.root, session.session_id)
    incarnations = Incarnations(
        home=runtime.home,
        session_id=session.session_id,
        spec=spec,
        drivers=runtime.drivers(runsc),
        store=store,
        staging=staging,
        clock=clock,
    )
    gateway, checkpointer = _gateway_and_checkpointer(runtime, records, spec, store, staging, crossroads, watcher)
    hibernation = Hibernation(
        records=records,
        gateway=gateway,
        checkpointer=checkpointer,
        incarnations=incarnations,
        staging=staging,
        tiers=runtime.tiers,
        clock=clock,
        watcher=watcher,
        attended=attended,
    )
    beginning = Beginning(
        spec=spec,
        records=records,
        gateway=gateway,
        checkpointer=checkpointer,
        clock=clock,
        watcher=watcher,
        attended=attended,
    )
    return Owner(
        records=records,
        incarnations=incarnations,
        ladder=Ladder(
            records=records,
            incarnations=incarnations,
            gateway=gateway,
            clock=clock,
            on_lost=spec.on_lost,
            boot=boot,
        ),
        gateway=gateway,
        crossroads=crossroads,
        checkpointer=checkpointer,
        staging=staging,
        images=runtime.images,
        clock=clock,
        watcher=watcher,
        beginning=beginning,
        hibernation=hibernation,
        memory=Memory(records=records, checkpointer=checkpointer, watcher=watcher),
    )


def _gateway_and_checkpointer(
    runtime: "Runtime",
    records: Records,
    spec: SessionSpec,
    store: SessionStore,
    staging: Staging,
    crossroads: Crossroads,
    watcher: Watcher,
) -> tuple[Gateway, Checkpointer]:
    """Each calls the other: a model that thinks is the moment for a checkpoint, and a cut asks what is open."""

    async def on_call(call_id: CallId, first_byte_at: FirstByteAt) -> None:
        await checkpointer.take_turn(call_id, first_byte_at)

    async def spawn_for(call: Call, body: SpawnBody, point: Checkpoint) -> SessionId:
        return await make_child(runtime, spec, store, point, call, body)

    async def checkpoint_for(call: Call) -> Checkpoint | None:
        return await checkpointer.take_for(call)

    gateway = Gateway(
        database=runtime.database,
        session_id=records.session_id,
        owner_token=records.owner_token,
        clock=runtime.clock,
        upstreams=runtime.upstreams,
        prices=runtime.prices,
        on_call=on_call,
        checkpoint_for=checkpoint_for,
        spawn_for=spawn_for,
        on_wait=watcher.notice,
        crossroads=crossroads,
    )
    checkpointer = Checkpointer(
        records=records,
        store=store,
        staging=staging,
        gateway=gateway,
        clock=runtime.clock,
        share_ppm=spec.checkpoint_share_ppm,
        retention=runtime.retention,
    )
    return gateway, checkpointer
